"""Which tokens each rank holds, and which tokens of other ranks its queries need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from attnopt.base.intervals import Ranges, common, merged
from attnopt.errors import DistributedError
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.part import count


class TooShortError(DistributedError):
    """Fewer tokens than ranks."""


Sources = Mapping[int, Ranges]  # rank -> those of its tokens that another one reads


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

    def count(self, rank: int) -> int:
        return count(self.positions[rank])

    def places(self, rank: int, chosen: Ranges) -> Ranges:
        """Where these positions lie among those that the rank holds."""
        found, before = list[tuple[int, int]](), 0
        for start, stop in self.positions[rank]:
            found += [(a - start + before, b - start + before) for a, b in common(chosen, ((start, stop),))]
            before += stop - start
        return merged(found)


@dataclass(frozen=True)
class Rounds:
    """An attention in several rounds: in each, rank r computes its queries with the keys of ``of[round][r]``, and the rounds are
    merged by their log-sum-exps."""

    method: str
    shards: Shards
    of: tuple[tuple[Sources, ...], ...]

    @classmethod
    def plan(cls, pattern: Pattern, heads: int, shards: Shards) -> Rounds:
        """All at once where a rank needs little of the others ("halo"), else one other rank at a time ("ring")."""
        needs = [needed(pattern, heads, shards, rank) for rank in range(shards.ranks)]
        ranks = range(shards.ranks)
        most = max(shards.count(rank) for rank in ranks)
        if all(2 * received(needs[rank], rank) <= most for rank in ranks):
            return cls(
                "halo" if any(received(needs[rank], rank) for rank in ranks) else "own keys", shards, (tuple(needs),)
            )
        rounds = [
            tuple({p: found} if (found := needs[r].get(p := (r - step) % shards.ranks)) else {} for r in ranks)
            for step in ranks
        ]
        return cls("ring", shards, tuple(r for r in rounds if any(r)))

    def tokens(self, rank: int) -> int:
        """Keys that the rank is sent."""
        return sum(received(sources[rank], rank) for sources in self.of)

    def sent(self, number: int, rank: int) -> Sources:
        """Which tokens of ``rank`` others read in this round."""
        return {
            other: sources[rank] for other, sources in enumerate(self.of[number]) if other != rank and rank in sources
        }


def needed(pattern: Pattern, heads: int, shards: Shards, rank: int) -> Sources:
    """The tokens that queries of ``rank`` may see, by the rank that holds them."""
    own = [pattern.for_head(h) for h in range(heads)] if pattern.is_per_head else [pattern]
    runs = shards.positions[rank]
    reaches = [p.reach(start, stop - 1, shards.length) for p in dict.fromkeys(own) for start, stop in runs]
    some = merged(k for reach in reaches for k in reach.some)
    found = {source: common(some, positions) for source, positions in enumerate(shards.positions)}
    return {source: tokens for source, tokens in found.items() if tokens}


def received(sources: Sources, rank: int) -> int:
    return sum(count(tokens) for source, tokens in sources.items() if source != rank)


def _cut(length: int, pieces: int) -> list[tuple[int, int]]:
    """Ranges that differ by at most one, the longer ones first."""
    each, more = divmod(length, pieces)
    ends = accumulate(each + (i < more) for i in range(pieces))
    return list(pairwise((0, *ends)))
