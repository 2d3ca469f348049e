from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_strategies import LEAVES

from attnopt.base.intervals import merged
from attnopt.errors import PolicyError
from attnopt.patterns import Causal, Part, Pattern, PerHead, Sinks, Window, parse

SOME = st.sets(st.integers(0, 30), min_size=1).map(lambda chosen: merged((n, n + 1) for n in chosen))


@settings(max_examples=80, deadline=None)
@given(LEAVES, LEAVES, SOME, SOME)
def test_rows_and_columns_of_the_whole_mask(a: Pattern, b: Pattern, queries: tuple, keys: tuple) -> None:
    whole = a | PerHead({1: b})
    rows, columns = ([n for start, stop in x for n in range(start, stop)] for x in (queries, keys))
    part = Part(whole, queries, keys, 31)
    want = whole.mask(31, 31, num_heads=2).expand(2, -1, -1)[:, rows][:, :, columns]
    assert torch.equal(part.mask(len(rows), len(columns), num_heads=2).expand(2, -1, -1), want)
    assert part.density(len(rows), len(columns), num_heads=2) == pytest.approx(
        want.double().mean().item()
    )  # by its reach
    assert parse(repr(part)) == part


def test_reach_is_tight() -> None:
    part = Part(Causal() & (Window(3, 0) | Sinks(2)), "8-15", "0-15", 16)
    assert part.reach(8, 8, 16).some == ((0, 2), (5, 9))
    assert Part(part.pattern, "8-9", "0-3,6-9", 16).reach(6, 7, 8).some == ((0, 2), (4, 8))


@pytest.mark.parametrize("keys", ["", "3-16", "nonsense"])
def test_positions_beyond_the_sequence(keys: str) -> None:
    with pytest.raises(PolicyError, match="Part: invalid value keys="):
        Part(Causal(), "0-3", keys, 16)
