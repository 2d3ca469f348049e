"""Bounds of numbers: what they hold, and that they read back as they print."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnopt.base.bound import Bound
from attnopt.errors import PolicyError

NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
WRITTEN = st.one_of(
    NUMBERS,
    st.tuples(st.sampled_from([">", ">=", "<", "<="]), NUMBERS).map(lambda pair: f"{pair[0]}{pair[1]!r}"),
    st.tuples(NUMBERS, NUMBERS).map(lambda pair: tuple(sorted(pair, key=float))),
)


@given(WRITTEN)
def test_what_it_prints_reads_back(written: Any) -> None:
    bound = Bound.of("where", "heads", written)
    assert Bound.of("where", "heads", ast.literal_eval(repr(bound))) == bound
    assert Bound.of("where", "heads", bound) is bound


@pytest.mark.parametrize(
    ("written", "inside", "outside"),
    [
        (12, [12], [11.999, 13]),
        (-2.5, [-2.5], [2.5, -2.4]),
        (">.8", [0.81, 1e9], [0.8, -1]),
        (">= 0.8", [0.8, 1], [0.79]),
        ("<-3", [-3.1], [-3, 3]),
        (" <= 2 ", [2, -5], [2.001]),
        ((4, 8), [4, 5.5, 8], [3.9, 8.1]),
        ([0, 0], [0], [1, -1]),
    ],
)
def test_what_it_holds(written: Any, inside: list[float], outside: list[float]) -> None:
    bound = Bound.of("where", "heads", written)
    assert all(x in bound for x in inside)
    assert not any(x in bound for x in outside)
    assert float("nan") not in bound


@pytest.mark.parametrize(
    "written",
    [
        "0.8",
        "",
        ">",
        "> x",
        ">nan",
        ">inf",
        "=>3",
        "<2<3",
        (1,),
        (1, 2, 3),
        (3, 1),
        ("a", 1),
        None,
        True,
        float("nan"),
        {},
    ],
)
def test_what_is_no_bound(written: Any) -> None:
    with pytest.raises(PolicyError, match="where: invalid value heads="):
        Bound.of("where", "heads", written)
