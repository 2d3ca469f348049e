"""Why the scores of two attentions differ: another scale, other positions, another norm, other heads, or other weights."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.audit.trace import Attended
from attnopt.ir.semantics import heads_of
from attnopt.report.audit import Difference

KINDS = frozenset(
    ("kv-map", "heads", "head-order", "scale", "inputs", "positions", "norms", "queries", "keys", "values")
)
NEAR = 10.0  # tolerance multiple for one explanation of a difference


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, relative to that of ``want``; infinite where the sizes differ."""
    if got.shape != want.shape:
        return float("inf")
    apart, size = (got.double() - want.double()).norm(), want.double().norm()
    return float(apart / size) if float(size) > 0 else float(apart > 0)


def keys_of(x: Attended) -> Tensor:
    """Those that each query head reads, [B, H, S, D]."""
    return heads_of(x.spec, x.operands.k).float()


def values_of(x: Attended) -> Tensor:
    return heads_of(x.spec, x.operands.v).float()


def scores_of(x: Attended) -> Tensor:
    return x.spec.scale * (x.operands.q.float() @ keys_of(x).mT)


def score_differences(model: Attended, file: Attended, tolerance: float) -> list[Difference]:
    """Of scores and values; one reason for the first, as far as one explains them."""
    want, got = scores_of(model), scores_of(file)
    differ, values = relative(got, want) > tolerance, relative(values_of(file), values_of(model)) > tolerance
    if not differ and not values:
        return []
    if (found := _kv_map(model, file, tolerance)) is not None:
        return [found]
    if (found := _zeroed(model, file)) is not None or (found := _order(model, file, tolerance)) is not None:
        return [found]
    of_values = [Difference("values", "its own values", _which(values_of(file), values_of(model), tolerance))]
    if not differ:
        return of_values
    if (found := _scaled(model, want, got, tolerance)) is not None:
        return [found, *(of_values if values else [])]
    q, k = relative(file.operands.q, model.operands.q), relative(keys_of(file), keys_of(model))
    if values and min(q, k) > tolerance:
        return [Difference("inputs", "the layers before it as they are", "other queries, keys and values alike")]
    return [_of_queries_and_keys(model, file, tolerance), *(of_values if values else [])]


def _scaled(model: Attended, want: Tensor, got: Tensor, tolerance: float) -> Difference | None:
    factor = float((got.double() * want.double()).sum() / want.double().square().sum().clamp(min=1e-30))
    if relative(got, factor * want) > NEAR * tolerance or factor <= 0:
        return None
    return Difference("scale", f"{model.spec.scale:.6g}", f"{model.spec.scale * factor:.6g}")


def _kv_map(model: Attended, file: Attended, tolerance: float) -> Difference | None:
    """The same query heads read other K/V heads than in the model."""
    own = model.spec.kv_of_head
    if model.spec.num_kv_heads == model.spec.num_heads:
        return None
    queries, there, keys = _unit(file.operands.q), _unit(keys_of(file)), _unit(model.operands.k)
    if relative(queries, _unit(model.operands.q)) > NEAR * tolerance:
        return None
    found = []
    for h in range(model.spec.num_heads):
        groups = range(model.spec.num_kv_heads)
        errors = [relative(there[:, h], keys[:, g]) for g in groups]
        best = min(groups, key=errors.__getitem__)
        if errors[best] > NEAR * tolerance:
            return None
        found.append(own[h] if errors[own[h]] <= NEAR * tolerance else best)
    if tuple(found) == own:
        return None
    return Difference("kv-map", _map_text(own), _map_text(found))


def _unit(x: Tensor) -> Tensor:
    """Each head [B, h, S, D] of norm 1, wherever a scale stands."""
    size: Tensor = x.float().square().sum((0, 2, 3), keepdim=True).sqrt()
    return x.float() / size.clamp(min=1e-12)


def _map_text(kv_of_head: tuple[int, ...] | list[int]) -> str:
    return f"query heads read K/V heads {', '.join(map(str, kv_of_head))}"


def _zeroed(model: Attended, file: Attended) -> Difference | None:
    """Heads whose values, or queries and keys, are zeros in the file."""

    def empty(x: Tensor) -> set[int]:
        return {h for h in range(x.shape[1]) if not bool(x[:, h].any())}

    lost = empty(values_of(file)) - empty(values_of(model)) | empty(file.operands.q) - empty(model.operands.q)
    if not lost:
        return None
    return Difference("heads", f"{model.spec.num_heads} heads", f"zeros in the place of {_heads(lost)}")


def _order(model: Attended, file: Attended, tolerance: float) -> Difference | None:
    """The same heads, in another order."""
    want, got = scores_of(model), scores_of(file)
    of_model, of_file = values_of(model), values_of(file)
    order = []
    for h in range(got.shape[1]):
        fits = [
            g
            for g in range(want.shape[1])
            if g not in order
            and relative(got[:, h], want[:, g]) <= tolerance
            and relative(of_file[:, h], of_model[:, g]) <= tolerance
        ]
        if not fits:
            return None
        order.append(fits[0])
    return Difference("head-order", "heads in order", f"heads {', '.join(map(str, order))}")


def _of_queries_and_keys(model: Attended, file: Attended, tolerance: float) -> Difference:
    pairs = {"queries": (file.operands.q.float(), model.operands.q.float()), "keys": (keys_of(file), keys_of(model))}
    off = {role: pair for role, pair in pairs.items() if relative(*pair) > tolerance}
    off = off or pairs
    if all(_same_norms(*pair, NEAR * tolerance) for pair in off.values()):
        text = ", ".join(model.spec.positions) or "its own"
        return Difference("positions", text, f"{' and '.join(off)} of the same length, turned otherwise")
    if all(_same_directions(*pair, NEAR * tolerance) for pair in off.values()):
        return Difference("norms", "its own norm", f"{' and '.join(off)} of another length at each token")
    kind = next(iter(off)) if len(off) == 1 else "queries"
    return Difference(kind, f"its own {' and '.join(off)}", "; ".join(_which(*p, tolerance) for p in off.values()))


def _same_norms(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return relative(got.norm(dim=-1), want.norm(dim=-1)) <= tolerance


def _same_directions(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return (
        relative(torch.nn.functional.normalize(got, dim=-1), torch.nn.functional.normalize(want, dim=-1)) <= tolerance
    )


def _which(got: Tensor, want: Tensor, tolerance: float) -> str:
    """The heads that differ."""
    off = {h for h in range(want.shape[1]) if relative(got[:, h], want[:, h]) > tolerance}
    worst = max((relative(got[:, h], want[:, h]) for h in off), default=relative(got, want))
    return f"others in {_heads(off) if len(off) < want.shape[1] else 'all heads'}, by {worst:.2g}"


def _heads(numbers: set[int]) -> str:
    return f"head{'s' if len(numbers) != 1 else ''} {', '.join(map(str, sorted(numbers)))}"
