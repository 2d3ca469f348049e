"""Patterns as small pictures: the fraction of visible pairs in each cell of a coarse grid, never the dense mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from attnopt.errors import AttnoptError
from attnopt.patterns import parse
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.block_layout import FULL_TILE
from attnopt.patterns.tile_cost import COMPILED

CELLS = 32
LEVELS = 4  # of opacity
LONGEST = 1 << 15  # in a longer sequence, a cell would have too many pairs to count for a picture


@lru_cache(maxsize=512)
def shares(pattern: Pattern, q_len: int, kv_len: int, cells: int = CELLS) -> NDArray[np.float64]:
    """[rows, columns], at most ``cells`` each: the exact fraction of visible pairs in each cell, 0 to 1.

    ``pattern`` must not be per head; see ``Pattern.for_head``.
    """
    tall, wide = max(1, -(-q_len // cells)), max(1, -(-kv_len // cells))
    found = pattern.layout(q_len, kv_len, tall, wide)
    height = np.minimum(tall, q_len - np.arange(found.num_rows) * tall)
    width = np.minimum(wide, kv_len - np.arange(found.num_cols) * wide)
    counts = np.append(found.tiles.sum((1, 2)), 0)
    area = height[found.rows] * width[found.cols]
    grid = np.zeros((found.num_rows, found.num_cols))
    grid[found.rows, found.cols] = np.where(found.tile == FULL_TILE, 1.0, counts[found.tile] / area)
    return grid


@dataclass(frozen=True)
class Layer:
    """One opacity, 1 to ``LEVELS``, of a picture, as the data of an SVG path in which a cell is a unit square."""

    level: int
    path: str


@dataclass(frozen=True)
class Picture:
    """The current pattern of the heads at ``places``, drawn over the one ``before``."""

    rows: int
    columns: int
    layers: tuple[Layer, ...]
    before: tuple[Layer, ...]
    pattern: str
    places: tuple[int, ...]  # () means all
    density: float  # fraction of visible pairs
    computed: float  # fraction of pairs that the compiled CPU kernel computes in blocks


def pictures(
    pattern: str | Pattern, q_len: int, kv_len: int, num_heads: int, before: str | Pattern | None = None
) -> tuple[Picture, ...]:
    """One picture for each distinct pattern of the heads; none if the pattern or the lengths cannot be drawn.

    ``before`` is a pattern of as many heads.
    """
    if not (0 < q_len <= LONGEST and 0 < kv_len <= LONGEST):
        return ()
    try:
        now = parse(pattern) if isinstance(pattern, str) else pattern
        was = parse(before) if isinstance(before, str) else before
        groups: dict[tuple[Pattern, Pattern | None], list[int]] = {}
        for place in range(num_heads if now.is_per_head or (was and was.is_per_head) else 1):
            groups.setdefault((now.for_head(place), was and was.for_head(place)), []).append(place)
        return tuple(
            _picture(one, q_len, kv_len, tuple(places) if len(groups) > 1 else (), old)
            for (one, old), places in groups.items()
        )
    except AttnoptError:  # a pattern of a third party, whose text cannot be read back
        return ()


def _picture(pattern: Pattern, q_len: int, kv_len: int, places: tuple[int, ...], before: Pattern | None) -> Picture:
    grid = shares(pattern, q_len, kv_len)
    return Picture(
        rows=grid.shape[0],
        columns=grid.shape[1],
        layers=_layers(grid),
        before=() if before is None or before == pattern else _layers(shares(before, q_len, kv_len)),
        pattern=str(pattern),
        places=places,
        density=pattern.density(q_len, kv_len),
        computed=COMPILED.share(pattern, q_len, kv_len, 1),
    )


def _layers(grid: NDArray[np.float64]) -> tuple[Layer, ...]:
    levels = np.ceil(grid * LEVELS).astype(int)
    drawn = ((level, _runs(levels == level)) for level in range(1, LEVELS + 1))
    return tuple(Layer(level, path) for level, path in drawn if path)


def _runs(cells: NDArray[np.bool_]) -> str:
    """The cells as an SVG path: one rectangle for each run in a row."""
    parts: list[str] = []
    for y, row in enumerate(cells):
        x = 0
        for inside, run in groupby(row):
            n = len(list(run))
            parts += [f"M{x} {y}h{n}v1h-{n}z"] if inside else []
            x += n
    return "".join(parts)
