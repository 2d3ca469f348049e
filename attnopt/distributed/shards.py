"""Which tokens each rank holds, and which tokens of other ranks its queries need."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from attnopt.base.intervals import Ranges, common, merged
from attnopt.distributed.traffic import Received, Sizes
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

    @property
    def longest(self) -> int:
        """The most tokens that a rank holds."""
        return max(map(self.count, range(self.ranks)))

    def count(self, rank: int) -> int:
        return count(self.positions[rank])

    def places(self, rank: int, chosen: Ranges) -> Ranges:
        """Where these positions lie among those that the rank holds."""
        found, before = list[tuple[int, int]](), 0
        for start, stop in self.positions[rank]:
            found += [(a - start + before, b - start + before) for a, b in common(chosen, ((start, stop),))]
            before += stop - start
        return merged(found)

    def held(self, tokens: Ranges) -> Sources:
        """These tokens, by the rank that holds them."""
        found: dict[int, list[tuple[int, int]]] = {}
        starts, runs = self._runs
        for start, stop in tokens:
            place = bisect_right(starts, start) - 1
            while place < len(runs) and starts[place] < stop:
                _, end, rank = runs[place]
                found.setdefault(rank, []).append((max(start, starts[place]), min(stop, end)))
                place += 1
        return {rank: merged(found[rank]) for rank in sorted(found)}

    @cached_property
    def _runs(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Every run with its rank, in the order of positions, and where they start."""
        runs = sorted((start, stop, rank) for rank, own in enumerate(self.positions) for start, stop in own)
        return [start for start, _, _ in runs], runs


@dataclass(frozen=True)
class Rounds:
    """An attention in several rounds: in each, a rank computes its queries with some of the keys that it needs, and the rounds
    are merged by their log-sum-exps.

    ``needs``: of each rank, all of these keys.  ``turns``: a round has the keys of the rank that is so far before; (): one round
    has all of them.
    """

    method: str
    shards: Shards
    needs: tuple[Sources, ...]
    turns: tuple[int, ...] = ()

    @classmethod
    def plan(cls, pattern: Pattern, heads: int, shards: Shards) -> Rounds:
        """All at once where a rank needs little of the others ("halo"), else one other rank at a time ("ring")."""
        ranks = range(shards.ranks)
        needs = tuple(needed(pattern, heads, shards, rank) for rank in ranks)
        arriving = [received(needs[rank], rank) for rank in ranks]
        if 2 * max(arriving) <= shards.longest:
            return cls("halo" if any(arriving) else "own keys", shards, needs)
        turns = {(rank - source) % shards.ranks for rank in ranks for source in needs[rank]}
        return cls("ring", shards, needs, tuple(sorted(turns)))

    @property
    def count(self) -> int:
        return len(self.turns) or 1

    def sources(self, number: int, rank: int) -> Sources:
        """The keys that the rank uses in this round."""
        if not self.turns:
            return self.needs[rank]
        source = (rank - self.turns[number]) % self.shards.ranks
        return {source: tokens} if (tokens := self.needs[rank].get(source)) else {}

    def sent(self, number: int, rank: int) -> Sources:
        """Which tokens of ``rank`` others read in this round."""
        ranks = self.shards.ranks
        others = ((rank + self.turns[number]) % ranks,) if self.turns else range(ranks)
        read = {other: self.sources(number, other).get(rank) for other in others if other != rank}
        return {other: tokens for other, tokens in read.items() if tokens}

    def tokens(self, rank: int) -> int:
        """Keys that the rank is sent."""
        return received(self.needs[rank], rank)

    def arriving(self, sizes: Sizes) -> Iterator[Sequence[Received]]:
        """What each rank is sent, round by round."""
        for number in range(self.count):
            yield [self._arriving(self.sources(number, rank), rank, sizes) for rank in range(self.shards.ranks)]

    def _arriving(self, sources: Sources, rank: int, sizes: Sizes) -> Received:
        return Received(len(sources) - (rank in sources), received(sources, rank) * sizes.of_key)

    def workspace(self, sizes: Sizes) -> int:
        """Bytes that a rank holds at most beside its own operands: keys of two rounds as they arrive, as many that leave or are
        put in order, and five outputs while two are merged."""
        rounds = [max(r.bytes for r in step) for step in self.arriving(sizes)]
        keys = max(a + b for a, b in pairwise((*rounds, 0)))
        return 2 * keys + 5 * self.shards.longest * sizes.of_sum


def needed(pattern: Pattern, heads: int, shards: Shards, rank: int) -> Sources:
    """The tokens that queries of ``rank`` may see, by the rank that holds them."""
    own = [pattern.for_head(h) for h in range(heads)] if pattern.is_per_head else [pattern]
    runs = shards.positions[rank]
    reaches = [p.reach(start, stop - 1, shards.length) for p in dict.fromkeys(own) for start, stop in runs]
    return shards.held(common(merged(k for reach in reaches for k in reach.some), ((0, shards.length),)))


def received(sources: Sources, rank: int) -> int:
    return sum(count(tokens) for source, tokens in sources.items() if source != rank)


def _cut(length: int, pieces: int) -> list[tuple[int, int]]:
    """Ranges that differ by at most one, the longer ones first."""
    each, more = divmod(length, pieces)
    ends = accumulate(each + (i < more) for i in range(pieces))
    return list(pairwise((0, *ends)))
