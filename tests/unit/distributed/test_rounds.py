from __future__ import annotations

import pytest
import torch

from attnopt.base.intervals import Ranges, common, merged
from attnopt.distributed.rounds import Rounds, needed
from attnopt.distributed.shards import Shards
from attnopt.distributed.traffic import Link, Sizes
from attnopt.patterns import Causal, Dilated, Full, Global, PerHead, Sinks, Strided, Window
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.part import count

SIZES = Sizes(2, 4, 2, 8, 6, (torch.float32,) * 3)
TAIL = Causal() & (Window(3, 0) | Sinks(2))
PATTERNS = [
    Full(), Causal(), Window(2), TAIL, Causal() & (Window(20, 0) | Sinks(1)), Causal() & Dilated(3, 0, 4), Strided(7),
    Window(1) | Global([0, 11]), PerHead({0: Window(1, 0), 1: Sinks(3)}, Causal() & Window(5, 0)), ~Full(),
]  # fmt: skip


def test_a_window_sends_its_tail_and_sinks() -> None:
    rounds = Rounds.plan(TAIL, 1, Shards.of(64, 4))
    assert rounds.method == "halo"
    assert rounds.tokens == (0, 5, 5, 5)


def test_a_window_longer_than_a_shard_reaches_over_it() -> None:
    rounds = Rounds.plan(Causal() & Window(20, 0), 1, Shards.of(64, 4))
    assert rounds.method == "ring"
    assert rounds.tokens == (0, 16, 20, 20)


def test_all_keys_of_all_ranks_travel_one_rank_at_a_time() -> None:
    rounds = Rounds.plan(Window(100), 1, Shards.of(64, 4))
    assert [len(rounds.sources(number, 0)) for number in range(rounds.count)] == [1, 1, 1, 1]
    assert rounds.tokens == (48,) * 4


def test_keys_that_only_the_last_query_sees_are_sent() -> None:
    assert needed(Window(0, 1), 1, Shards.of(8, 2), 0) == ((0, 5),)


def test_nobody_waits_for_rounds_in_which_it_is_sent_nothing() -> None:
    """Sinks come from a rank that is another number of turns before each; the tail alone is too long for a halo."""
    ranks, own = 64, 16
    rounds = Rounds.plan(Causal() & (Window(own - 1, 0) | Sinks(2)), 1, Shards.of(ranks * own, ranks))
    assert rounds.method == "ring"
    assert rounds.turns == ((0,), (1,), tuple(range(2, ranks)))
    assert Link(latency=1.0, bandwidth=float("inf")).seconds(rounds.arriving(SIZES)) == 2.0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("length", "ranks", "zigzag"), [(61, 4, False), (61, 4, True), (64, 16, False), (9, 1, True)])
def test_each_key_arrives_once_and_is_counted(pattern: Pattern, length: int, ranks: int, zigzag: bool) -> None:
    shards = Shards.of(length, ranks, zigzag)
    rounds = Rounds.plan(pattern, 4, shards)
    arriving = rounds.arriving(SIZES)
    seen = pattern.mask(length, length, num_heads=4).any(0)
    for rank in range(ranks):
        arrived: list[tuple[int, int]] = []
        for number in range(rounds.count):
            sources = rounds.sources(number, rank)
            others = {source: keys for source, keys in sources.items() if source != rank}
            assert {to: rounds.sent(number, to).get(rank) for to in others} == others
            assert arriving.messages[number, rank] == len(others)
            assert arriving.bytes[number, rank] == sum(map(count, others.values())) * SIZES.of_key
            assert len(others) <= 1 or arriving.bytes[number, rank] <= shards.longest * SIZES.of_key
            assert all(common(keys, shards.positions[source]) == keys for source, keys in sources.items())
            arrived += [run for keys in sources.values() for run in keys]
        assert count(merged(arrived)) == sum(stop - start for start, stop in arrived)
        assert merged(arrived) == rounds.needs[rank]
        assert not seen[_places(shards.positions[rank])][:, _places(_outside(rounds.needs[rank], length))].any()


def _places(ranges: Ranges) -> list[int]:
    return [n for start, stop in ranges for n in range(start, stop)]


def _outside(ranges: Ranges, length: int) -> Ranges:
    return tuple((n, n + 1) for n in range(length) if not common(ranges, ((n, n + 1),)))
