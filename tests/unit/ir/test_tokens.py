"""Positions of tokens, against Python's own indices."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnopt.ir import tokens as positions

TOKENS = st.one_of(
    st.sets(st.integers(-9, 9), max_size=7).map(sorted),
    st.builds(
        lambda start, count, step: list(range(start, start + count * step, step)),
        st.integers(-9, 9), st.integers(1, 5), st.integers(1, 4),
    ),
)  # fmt: skip


def by_python(tokens: list[int], length: int) -> list[int]:
    sequence = list(range(length))
    found = set()
    for t in tokens:
        try:
            found.add(sequence[t])
        except IndexError:
            continue
    return sorted(found)


@given(TOKENS, st.integers(1, 12), st.integers(0, 4))
def test_positions_are_pythons(tokens: list[int], length: int, first: int) -> None:
    at = torch.arange(length)[first:]
    assert at[positions.among(tokens, at, length)].tolist() == [t for t in by_python(tokens, length) if t >= first]
    found, there = positions.positions(tokens, length, torch.device("cpu"))
    assert found.tolist() == by_python(tokens, length)
    assert there is None
    missing = positions.out_of_range(tokens, length)
    assert len({t % length for t in tokens if t not in missing}) == len(by_python(tokens, length))
    assert bool(missing) == (length < positions.shortest(tokens))


@given(TOKENS, st.integers(1, 12))
def test_positions_in_any_length_are_those_in_a_known_one(tokens: list[int], length: int) -> None:
    with mock.patch("attnopt.ir.tokens.is_static", return_value=False):
        found, there = positions.positions(tokens, length, torch.device("cpu"))
    assert there is not None
    assert sorted(found[there].tolist()) == by_python(tokens, length), "each token once"
    assert not bool(((found < 0) | (found >= length)).any())


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (None, "all tokens"),
        ([3], "token 3"),
        ([-1, 0, 1, 2], "tokens 0 to 2 and -1"),
        ([-3, -2, -1], "tokens -3 to -1"),
        ([0, 2, 4, 6], "tokens 0 to 6 by 2"),
        ([0, 4], "tokens 0 and 4"),
        ([0, 3, 9, 20, 50, 51, 90, 99], "8 tokens, 0, 3, 9, 20, 50 to 51, ..., 99"),
    ],
)
def test_texts(tokens: list[int] | None, text: str) -> None:
    assert positions.told(tokens) == text
