"""Plans for ranks that are not there."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from parallel_checks import SINKS, STYLES, TAIL, optimized
from parallel_models import DIM, Style, translated, translator

import attnopt
from attnopt.distributed import Link, plan
from attnopt.distributed.head_exchange import HeadShares
from attnopt.distributed.shards import Shards
from attnopt.distributed.traffic import Arriving
from attnopt.errors import DistributedError, PolicyError
from attnopt.passes import LocalWindow

FULL = Style(causal=False, layers=1)
PER_TOKEN = 2 * 2 * 4 * DIM * 4  # batch, keys and values, heads, features, bytes


@pytest.fixture(scope="module")
def full() -> attnopt.OptimizedModel:
    return optimized(FULL)


def test_a_window_sends_a_small_part_of_all_keys() -> None:
    """24 times less than an all-gather at 32k tokens on 4 ranks with a window of 1,024."""
    one = optimized(Style(layers=1), LocalWindow(left=1023, right=0))
    made = plan(one, 4, 32768)
    (own,) = made.attentions
    assert own.method == "halo"
    assert max(own.bytes) == 1023 * PER_TOKEN
    assert 24 * max(own.bytes) <= 32768 * 3 // 4 * PER_TOKEN
    assert max(plan(one, 1024, 1 << 20).attentions[0].tokens) == 1023


def test_sinks_are_sent_beside_the_tail() -> None:
    made = plan(optimized(STYLES[2], TAIL), 8, 1000)
    assert max(made.attentions[0].tokens) == 3 + SINKS


def test_many_ranks_send_heads_only_if_they_have_some(full: attnopt.OptimizedModel) -> None:
    assert [plan(full, n, 4096).attentions[0].method for n in (1, 2, 4, 8, 64)] == [
        "own keys", "ring", "all-to-all", "ring", "ring",
    ]  # fmt: skip


def test_memory_falls_with_the_ranks(full: attnopt.OptimizedModel) -> None:
    alone, eight = (plan(full, n, 1 << 16, method="keys").memory for n in (1, 8))
    of_width = 2 * (1 << 16) * 32 * 4  # one activation of every token
    assert 4 * of_width < alone < 12 * of_width  # q, k, v and outputs that are merged, and not all that ever was
    assert 4 <= alone / eight <= 8


def test_the_time_of_a_ring_is_that_of_its_rounds(full: attnopt.OptimizedModel) -> None:
    made = plan(full, 4, 4096, method="keys", link=Link(latency=1.0, bandwidth=1024 * PER_TOKEN))
    assert made.seconds == pytest.approx(3 * 2.0)
    made = plan(full, 4, 4096, method="heads", link=Link(latency=1.0, bandwidth=float("inf")))
    assert made.seconds == 2 * 3 * 1.0


def test_steps_wait_for_the_slowest_rank() -> None:
    steps = Arriving(np.array([[1, 3], [0, 1]]), np.array([[100, 10], [0, 10]]))
    assert Link(latency=1.0, bandwidth=100.0).seconds(steps) == pytest.approx(3.1 + 1.1)
    assert steps.totals == (100, 20)


def test_links_that_cannot_be() -> None:
    for options in ({"latency": -1.0}, {"bandwidth": 0.0}, {"bandwidth": float("nan")}):
        with pytest.raises(PolicyError, match=r"invalid value Link\(.*expected a latency of at least 0"):
            Link(**options)


@pytest.mark.parametrize("link", [Link(), Link(latency=0.0), Link(latency=1.0, bandwidth=1e9)], ids=str)
def test_the_method_of_least_time_is_chosen(link: Link) -> None:
    one, methods = optimized(Style(layers=1)), set[str]()
    for ranks, length in ((2, 32), (4, 32), (4, 4096), (3, 100)):
        by_method = {m: plan(one, ranks, length, method=m, link=link) for m in ("keys", "heads", "auto")}
        assert by_method["auto"].seconds == min(p.seconds for p in by_method.values())
        methods.add(by_method["auto"].attentions[0].method)
    assert methods == ({"ring", "all-to-all"} if link.latency < 1 else {"ring"})


@pytest.mark.parametrize("policy", ["fuse", LocalWindow(left=1023, right=0, sinks=4)], ids=["causal", "window"])
def test_plans_for_1024_ranks_take_less_than_two_seconds(policy: object) -> None:
    one, start = optimized(Style(), policy), time.process_time()
    made = plan(one, 1024, 1 << 20)
    assert time.process_time() - start < 2
    most = 1023 if policy == "fuse" else 2
    assert made.attentions[0].seconds == pytest.approx(most * 1e-5 + max(made.attentions[0].bytes) / 2.5e10, rel=0.01)


def test_collected_outputs_count() -> None:
    one = optimized(FULL)
    own, whole = (plan(one, 4, 30, outputs=outputs) for outputs in ("own", "whole"))
    assert own.collected == ()
    ((name, sent),) = whole.collected
    assert sent == 3 * 8 * 2 * 31 * 4  # other ranks, their tokens padded to 8, batch, features, bytes
    assert name in str(whole)


def test_sizes_of_the_example_and_of_given_inputs() -> None:
    one = optimized(FULL)
    assert plan(one, 2).length == 10
    assert plan(one, 2, args=(torch.empty(3, 77, dtype=torch.long, device="meta"),)).length == 77
    crossing = attnopt.optimize(translator(True), "fuse", translated(True, 10, 7), dynamic_shapes="auto")  # torch's own
    assert plan(crossing, 2, 50).length == 50
    assert [a.site for a in plan(crossing, 2, 50).attentions] == ["decoder.0", "decoder.1"]


def test_plans_that_cannot_be() -> None:
    one = optimized(FULL)
    with pytest.raises(DistributedError, match="5 tokens cannot be shared by 8 ranks"):
        plan(one, 8, 5)
    with pytest.raises(PolicyError, match="ranks=0"):
        plan(one, 0, 5)
    with pytest.raises(DistributedError, match="expected an optimized model, found Linear"):
        plan(torch.nn.Linear(2, 2), 8, 5)  # type: ignore[arg-type]
    fixed = attnopt.optimize(translator(False), "fuse", translated(False, 10, 7), backend="blocked")
    with pytest.raises(DistributedError, match="the attentions are over 10 tokens, and no one free axis makes that 50"):
        plan(fixed, 2, 50)
    assert plan(fixed, 2, 10).length == 10


@pytest.mark.parametrize(
    ("kv_of_head", "ranks", "wanted"),
    [
        ((0, 0, 1, 1), 2, ((0, 1), (2, 3))),
        ((0, 1, 0, 1), 2, ((0, 2), (1, 3))),  # tiled
        ((0, 0, 0, 1, 2), 2, ((0, 1, 2), (3, 4))),  # unequal, as after pruning
        ((0, 1, 2, 3, 4), 2, ((0, 2, 4), (1, 3))),
        ((2, 2, 5), 2, ((0, 1), (2,))),  # key/value heads that none reads
        ((0, 0, 0, 0), 2, None),
    ],
)
def test_groups_of_heads_stay_whole(kv_of_head: tuple, ranks: int, wanted: tuple | None) -> None:
    found = HeadShares.of(kv_of_head, Shards.of(8, ranks))
    assert (None if found is None else found.heads) == wanted
    if found is not None:
        own = zip(found.heads, found.kv_heads, strict=True)
        assert all({kv_of_head[h] for h in heads} == set(kv) for heads, kv in own)
