"""Which attention of the file is which of the model: by the content of the weights where it survives, otherwise by form, then by
order.  Names say nothing: exporters make their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from attnopt.ir.site import Site

CLOSE = 0.02  # of the norm of the weights of each role: what storing them in 8 bits leaves
_GAP, _UNLIKE = 1.0, 1.5  # the cost of an attention without a partner, and of a pair that differs in form


def paired(model: Sequence[Site], file: Sequence[Site]) -> list[tuple[int | None, int | None]]:
    """Every site of either once; pairs and those of the model in the model's order, then those of the file alone."""
    partner = _by_weights(model, file)
    for among in (_by_form, _in_order):
        left = [i for i in range(len(model)) if i not in partner]
        free = [j for j in range(len(file)) if j not in partner.values()]
        found = among([model[i] for i in left], [file[j] for j in free])
        partner |= {left[i]: free[j] for i, j in found.items()}
    alone = [j for j in range(len(file)) if j not in partner.values()]
    return [*((i, partner.get(i)) for i in range(len(model))), *((None, j) for j in alone)]


def _by_weights(model: Sequence[Site], file: Sequence[Site]) -> dict[int, int]:
    """Where exactly one of the file has weights of these norms, and they are of no other attention of the model.  Only if that
    keeps the order: an attention whose weights moved to another place is a difference, not a pair."""
    own, there = [_norms(s) for s in model], [_norms(s) for s in file]
    fits = {i: [j for j, b in enumerate(there) if _close(a, b)] for i, a in enumerate(own)}
    owners = Counter(j for found in fits.values() for j in found)
    sure = {i: found[0] for i, found in fits.items() if len(found) == 1 and owners[found[0]] == 1}
    return sure if list(sure.values()) == sorted(sure.values()) else {}


def _norms(site: Site) -> dict[str, float]:
    """Of each role's weights, which neither another layout nor another order of heads changes."""
    found = {}
    for role, p in site.projections.items():
        weight = None if p.weight is None else site.parameters.get(p.weight)
        if weight is None or p.rows is None or not weight.is_floating_point() or weight.dim() != 2 or weight.is_meta:
            continue
        rows = torch.tensor(sorted({r for head in p.rows for r in head}))
        axis = 1 if (role == "out") != bool(p.transposed) else 0
        if len(rows) and int(rows.max()) < weight.shape[axis]:
            found[role] = float(weight.detach().float().cpu().index_select(axis, rows).norm())
    return found


def _close(a: dict[str, float], b: dict[str, float]) -> bool:
    shared = a.keys() & b.keys()
    return len(shared) >= 2 and all(abs(a[r] - b[r]) <= CLOSE * max(a[r], b[r]) for r in shared)


def _by_form(model: Sequence[Site], file: Sequence[Site]) -> dict[int, int]:
    """Where both have as many of a form, in order: an exporter may write a decoder's first attention before the encoder's."""
    own, there = ([_form(s) for s in sites] for sites in (model, file))
    found: dict[int, int] = {}
    for form in set(own):
        mine, theirs = ([i for i, f in enumerate(forms) if f == form] for forms in (own, there))
        if len(mine) == len(theirs):
            found |= dict(zip(mine, theirs, strict=True))
    return found


def _in_order(model: Sequence[Site], file: Sequence[Site]) -> dict[int, int]:
    """The cheapest alignment of two sequences."""
    rows, columns = len(model) + 1, len(file) + 1
    cost = [[_GAP * (i + j) for j in range(columns)] for i in range(rows)]
    for i in range(1, rows):
        for j in range(1, columns):
            together = cost[i - 1][j - 1] + (0.0 if _form(model[i - 1]) == _form(file[j - 1]) else _UNLIKE)
            cost[i][j] = min(together, cost[i - 1][j] + _GAP, cost[i][j - 1] + _GAP)
    found: dict[int, int] = {}
    i, j = rows - 1, columns - 1
    while i and j:
        if cost[i][j] == cost[i - 1][j] + _GAP:
            i -= 1
        elif cost[i][j] == cost[i][j - 1] + _GAP:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found[i] = j
    return found


def _form(site: Site) -> tuple[int, ...]:
    return site.num_heads, site.head_dim, site.value_dim, site.q_len, site.kv_len
