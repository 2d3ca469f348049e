"""What heads do, as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.render.tables import table, to_text
from attnopt.report.collected import shape_text

if TYPE_CHECKING:
    from attnopt.report.attribution import Attribution
    from attnopt.report.collected import Collected


def collected_text(collected: Collected) -> str:
    """One row an attention or other branch, one column a kind, with shapes."""
    kinds = list(dict.fromkeys(kind for taken in collected.values() for kind in taken.values))
    rows = [
        (
            name or "(root)",
            _numbers(taken.heads),
            *(shape_text(taken[kind]) if kind in taken.values else "" for kind in kinds),
            str(taken.tokens or ""),
        )
        for name, taken in collected.items()
    ]
    how = f", {collected.reduce}" if collected.reduce else ""
    batches = f"{collected.batches} batch{'' if collected.batches == 1 else 'es'}"
    return to_text(table(f"collected from {batches}{how}", ("site", "heads", *kinds, "tokens"), rows))


def attribution_text(attribution: Attribution) -> str:
    """One row an attention with its heads, then all others: means over the targets."""
    every = sorted({h for numbers in attribution.numbers.values() for h in numbers})
    rows = []
    for name, x in attribution.heads.items():
        of = dict(zip(attribution.numbers[name], x.mean(0).tolist(), strict=True))
        rows.append((name or "(root)", *(f"{of[h]:+.3g}" if h in of else "" for h in every), f"{x.sum(1).mean():+.3g}"))
    empty = ("",) * len(every)
    rows += [(name, *empty, f"{x.mean():+.3g}") for name, x in attribution.others.items()]
    rows.append(("target", *empty, f"{attribution.target.mean():+.3g}"))
    n = len(attribution.target)
    title = f"direct attribution, mean of {n} target{'' if n == 1 else 's'}"
    return to_text(table(title, ("site", *map(str, every), "all"), rows), width=max(80, 40 + 9 * len(every)))


def _numbers(heads: tuple[int, ...]) -> str:
    """ "0-11", or "0, 2, 3" """
    if len(heads) > 2 and heads == tuple(range(heads[0], heads[-1] + 1)):
        return f"{heads[0]}-{heads[-1]}"
    return ", ".join(map(str, heads))
