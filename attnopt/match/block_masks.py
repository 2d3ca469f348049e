"""Blocks that a mask may consist of, read from where its rows change; whoever asks compares them with the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from attnopt.patterns import Blocks, Causal, Pattern


def blocks_in(mask: Tensor) -> Iterator[Pattern]:
    """Candidates for ``mask``, bool [L, L] with a key for each query."""
    length = len(mask)
    starts = mask.int().argmax(-1).tolist()
    stops = (length - mask.flip(-1).int().argmax(-1)).tolist()
    if mask.sum().item() != sum(stops) - sum(starts):
        return  # a row with a gap
    if all(stop == i + 1 for i, stop in enumerate(stops)):
        yield from (Causal() & p for p in _tiling(starts, [length] * length))
        return
    yield from _tiling(starts, stops)


def _tiling(starts: list[int], stops: list[int]) -> Iterator[Pattern]:
    """Blocks whose rows may have these first and last keys.  A window that reaches an edge tells nothing about its halo."""
    length = len(starts)
    ends = [i for i in range(1, length) if (starts[i - 1], stops[i - 1]) != (starts[i], stops[i])]
    if not ends:
        return
    first, last = ends[0], ends[-1]
    width = stops[0] - starts[0]
    apart = math.gcd(*(b - a for a, b in pairwise(ends)))
    for size in dict.fromkeys((apart,) if apart else (first, max(first, length - last), width)):
        shift = first % size
        begins = [(i - shift) // size * size + shift for i in range(length)]
        before = [begin - start for begin, start in zip(begins, starts, strict=True) if start > 0]
        behind = [stop - begin - size for begin, stop in zip(begins, stops, strict=True) if stop < length]
        halos = before + behind
        if halos and min(halos) == max(halos) >= 0:
            yield Blocks(size, halos[0], shift)
        if width >= size and (width - size) % 2 == 0:
            yield Blocks(size, (width - size) // 2, shift, "shift")
