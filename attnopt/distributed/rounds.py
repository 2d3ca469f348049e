"""Which keys of other ranks the queries of each rank need, and in which rounds they travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from attnopt.base.intervals import Ranges, common, merged
from attnopt.distributed.shards import Counts, Shards
from attnopt.distributed.traffic import Arriving, Sizes
from attnopt.patterns.algebra import Pattern

Sources = Mapping[int, Ranges]  # rank -> those of its tokens that another one reads


@dataclass(frozen=True, eq=False)
class Rounds:
    """An attention in several rounds: in each, a rank computes its queries with some of the keys that it needs, and the rounds
    are merged by their log-sum-exps.

    ``needs``: of each rank, all of these keys.  ``turns``: of each round; in turn t, a rank reads the keys of the rank that is t
    before it.
    """

    method: str
    shards: Shards
    needs: tuple[Ranges, ...]
    turns: tuple[tuple[int, ...], ...]

    @classmethod
    def plan(cls, pattern: Pattern, heads: int, shards: Shards) -> Rounds:
        """All at once where a rank needs little of the others ("halo"), else one other rank at a time ("ring").

        Turns of a ring that bring a rank no more keys together than one rank holds are one round: they take no more memory, and
        nobody waits for rounds in which it is sent nothing."""
        needs = tuple(needed(pattern, heads, shards, rank) for rank in range(shards.ranks))
        keys = _by_turn(needs, shards)
        used, most = np.flatnonzero(keys.any(1)).tolist(), int(keys[1:].sum(0).max(initial=0))
        if 2 * most <= shards.longest:
            return cls("halo" if most else "own keys", shards, needs, (tuple(used),))
        return cls("ring", shards, needs, tuple(_packed(keys, used, shards.longest)))

    @property
    def count(self) -> int:
        return len(self.turns)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Keys that each rank is sent."""
        return tuple(self._arriving[1].sum(0).tolist())

    def arriving(self, sizes: Sizes) -> Arriving:
        """What each rank is sent, round by round."""
        messages, tokens = self._arriving
        return Arriving(messages, tokens * sizes.of_key)

    def workspace(self, sizes: Sizes) -> int:
        """Bytes that a rank holds at most beside its own operands: keys of two rounds as they arrive, as many that leave or are
        put in order, and five outputs while two are merged."""
        most: list[int] = self._arriving[1].max(1).tolist()
        keys = max(a + b for a, b in pairwise((*most, 0)))
        return 2 * keys * sizes.of_key + 5 * self.shards.longest * sizes.of_sum

    def sources(self, number: int, rank: int) -> Sources:
        """The keys that the rank uses in this round."""
        turns = np.array(self.turns[number], np.int64)
        others = (rank - turns[self._keys[turns, rank] > 0]) % self.shards.ranks
        return {other: common(self.needs[rank], self.shards.positions[other]) for other in others.tolist()}

    def sent(self, number: int, rank: int) -> Sources:
        """Which tokens of ``rank`` others read in this round."""
        turns = np.array(self.turns[number], np.int64)
        others = (rank + turns) % self.shards.ranks
        others = others[(self._keys[turns, others] > 0) & (others != rank)]
        return {other: common(self.needs[other], self.shards.positions[rank]) for other in others.tolist()}

    @cached_property
    def _keys(self) -> Counts:
        return _by_turn(self.needs, self.shards)

    @cached_property
    def _arriving(self) -> tuple[Counts, Counts]:
        """Messages to each rank, and keys in them [rounds, ranks]."""
        rounds = [self._keys[[turn for turn in turns if turn]] for turns in self.turns]
        return np.stack([(keys > 0).sum(0) for keys in rounds]), np.stack([keys.sum(0) for keys in rounds])


def needed(pattern: Pattern, heads: int, shards: Shards, rank: int) -> Ranges:
    """The tokens that queries of ``rank`` may see."""
    own = [pattern.for_head(h) for h in range(heads)] if pattern.is_per_head else [pattern]
    runs = shards.positions[rank]
    reaches = [p.reach(start, stop - 1, shards.length) for p in dict.fromkeys(own) for start, stop in runs]
    return common(merged(k for reach in reaches for k in reach.some), ((0, shards.length),))


def _by_turn(needs: tuple[Ranges, ...], shards: Shards) -> Counts:
    """How many keys each rank needs of the one that is so far before it [turns, ranks]."""
    held = {tokens: shards.overlaps(tokens) for tokens in dict.fromkeys(needs)}
    of_rank, ranks = np.stack([held[tokens] for tokens in needs]), np.arange(shards.ranks)
    found: Counts = of_rank[ranks, (ranks - ranks[:, None]) % shards.ranks]
    return found


def _packed(keys: Counts, used: list[int], most: int) -> Iterator[tuple[int, ...]]:
    """The turns of each round; own keys alone, so that others travel while they are computed."""
    turns, held = list[int](), np.zeros_like(keys[0])
    for turn in used:
        if turns and (turns == [0] or (held + keys[turn]).max() > most):
            yield tuple(turns)
            turns, held = [], np.zeros_like(held)
        turns.append(turn)
        held = held + keys[turn]
    yield tuple(turns)
