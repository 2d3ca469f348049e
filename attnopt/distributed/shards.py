"""Which tokens each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from attnopt.base.intervals import Ranges, common, merged
from attnopt.errors import DistributedError
from attnopt.patterns.part import count

Counts = NDArray[np.int64]


class TooShortError(DistributedError):
    """Fewer tokens than ranks."""


@dataclass(frozen=True)
class Shards:
    """The positions that each rank holds, of ``length``; lengths of two ranks differ by at most two."""

    length: int
    positions: tuple[Ranges, ...]

    @classmethod
    def of(cls, length: int, ranks: int, zigzag: bool = False) -> Shards:
        """One run for each rank, or, under a causal mask, two, one from each end: then all have the same work.

        Raises TooShortError if a rank would have no token."""
        if length < ranks:
            raise TooShortError(
                f"{length} tokens cannot be shared by {ranks} ranks",
                hint="give longer sequences, or use fewer ranks on this axis of the mesh",
            )
        if not zigzag:
            return cls(length, tuple((run,) for run in _cut(length, ranks)))
        pieces = _cut(length, 2 * ranks)
        return cls(length, tuple(merged((pieces[r], pieces[2 * ranks - 1 - r])) for r in range(ranks)))

    @property
    def ranks(self) -> int:
        return len(self.positions)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many tokens each rank holds."""
        return tuple(map(count, self.positions))

    @cached_property
    def longest(self) -> int:
        """The most tokens that a rank holds."""
        return max(self.counts)

    def count(self, rank: int) -> int:
        return self.counts[rank]

    def places(self, rank: int, chosen: Ranges) -> Ranges:
        """Where these positions lie among those that the rank holds."""
        found, before = list[tuple[int, int]](), 0
        for start, stop in self.positions[rank]:
            found += [(a - start + before, b - start + before) for a, b in common(chosen, ((start, stop),))]
            before += stop - start
        return merged(found)

    def overlaps(self, tokens: Ranges) -> Counts:
        """How many of these tokens each rank holds [ranks]."""
        edges, ranks = self._runs
        starts, stops = np.array(tokens, np.int64).reshape(-1, 2).T
        below = np.append(0, np.cumsum(stops - starts))
        whole = np.searchsorted(stops, edges, side="right")  # runs of tokens that end before the edge
        inside = np.maximum(edges - np.append(starts, self.length)[whole], 0)  # of the next one
        found = np.zeros(self.ranks, np.int64)
        np.add.at(found, ranks, np.diff(below[whole] + inside))
        return found

    @cached_property
    def _runs(self) -> tuple[Counts, Counts]:
        """Where the runs of all ranks start, in their order, and the last ends; whose each is."""
        runs = sorted((start, rank) for rank, own in enumerate(self.positions) for start, _ in own)
        return np.array([*(start for start, _ in runs), self.length]), np.array([rank for _, rank in runs])


def _cut(length: int, pieces: int) -> list[tuple[int, int]]:
    """Ranges that differ by at most one, the longer ones first."""
    each, more = divmod(length, pieces)
    ends = accumulate(each + (i < more) for i in range(pieces))
    return list(pairwise((0, *ends)))
