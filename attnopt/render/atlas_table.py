"""The atlas of heads as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnopt.render.tables import table, to_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.report.atlas import Atlas

BLOCKS = " ▁▂▃▄▅▆▇█"  # a profile in one line


def atlas_text(atlas: Atlas) -> str:
    return to_text(atlas_table(atlas), width=max(100, 60 + 12 * len(atlas.statistics)))


def atlas_table(atlas: Atlas) -> RenderableType:
    """One row a head: its cluster, its attention at distances 0, 1, 2-3, 4-7, ..., and its numbers."""
    from rich.console import Group

    rows: list[tuple[str, ...]] = []
    for site, found in atlas.items():
        for i, head in enumerate(found.heads):
            profile = "" if found.profile is None else _line(found.profile.values[i])
            numbers = (of[site][i] if site in of else None for of in atlas.statistics.values())
            cells = ("" if x is None else f"{x:.3g}" for x in numbers)
            rows.append((site or "(root)", str(head), str(found.clusters[i]), profile, *cells))
    columns = ("attention", "head", "cluster", "reach", *atlas.statistics)
    parts: list[RenderableType] = [
        table(f"{atlas.headline}; reach: attention 0, 1, 2-3, 4-7, ... tokens away", columns, rows)
    ]
    if atlas.missing:
        parts.append(
            table(
                "Not measured",
                ("attention", "what", "why"),
                [(m.site or "(root)", m.of, m.why) for m in atlas.missing],
            )
        )
    return Group(*parts)


def _line(shares: Sequence[float]) -> str:
    most = max(shares, default=0.0) or 1.0
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * s / most)] for s in shares)
