"""What is written into a tensor piece by piece, against the module itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture

SIZE = 12
SCATTERS = ("slice_scatter", "select_scatter", "copy")


class Writing(nn.Module):
    """Numbers of its own and of the input, written over each other along one axis."""

    def __init__(self, axis: int, writes: list[slice | int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.axis, self.writes, self.dtype = axis, writes, dtype

    def forward(self, x: Tensor) -> Tensor:
        made = torch.zeros_like(x, dtype=self.dtype)
        for i, places in enumerate(self.writes, 1):
            target = made[(slice(None),) * self.axis + (places,)]
            source = x * i
            if isinstance(places, int):
                target.copy_(source.select(self.axis, i % SIZE))
            else:
                target.copy_(source.narrow(self.axis, 0, target.shape[self.axis]))
        return made + 1


def check(model: Writing) -> list[str]:
    """The result is as before; returns the writing operators that are left."""
    x = torch.randn(SIZE, SIZE, SIZE)
    module = capture(model, CallInputs((x,), {})).module
    assert_same([module(x)], [model(x)])
    names = [
        str(n.target).split(".")[1] for n in module.graph.nodes if n.op == "call_function" and "." in str(n.target)
    ]
    return [n for n in names if n in SCATTERS]


index = st.integers(-SIZE, SIZE - 1)
piece = st.builds(slice, st.none() | index, st.none() | index, st.none() | st.integers(1, 4))


@pytest.mark.slow
@given(st.integers(0, 2), st.lists(piece | index, min_size=1, max_size=5))
@settings(max_examples=25)
def test_random_pieces(axis: int, writes: list[slice | int]) -> None:
    assert not check(Writing(axis, writes))


def test_another_type_is_cast() -> None:
    assert not check(Writing(1, [slice(0, 5), slice(5, None)], torch.float64))


def test_places_in_turns() -> None:
    assert not check(Writing(0, [slice(i, None, 3) for i in range(3)]))


def test_a_source_is_spread_over_its_place() -> None:
    class Spread(Writing):
        def forward(self, x: Tensor) -> Tensor:
            made = torch.empty_like(x)
            made[:, :4] = x[:, :1]
            made[:, 4:] = x[0, 0]
            return made + 1

    assert not check(Spread(1, []))
