"""Pieces cut along one axis and joined along another: a permutation if they are all of a tensor, in order, else as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.graph.nodes import aten, is_call

MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda x: torch.cat(x.chunk(3, -1), 0),
    "split": lambda x: torch.cat(x.split(2, 2), 1),
    "sizes": lambda x: torch.cat(x.split([2, 2, 2], 2), -2),
    "to the last axis": lambda x: torch.cat(x.chunk(5, 1), -1),
    "slices": lambda x: torch.cat([x[..., :2], x[..., 2:4], x[..., 4:]], 0),
    "the same axis": lambda x: torch.cat(x.chunk(3, -1), -1),
}
LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "another order": lambda x: torch.cat(x.chunk(3, -1)[::-1], 0),
    "one twice": lambda x: torch.cat([x.chunk(3, -1)[i] for i in (0, 1, 1)], 0),
    "one left out": lambda x: torch.cat(x.chunk(3, -1)[:2], 0),
    "unequal": lambda x: torch.cat((*x.split([2, 2, 2], 2)[:2], x[..., 4:5].expand(-1, -1, 2)), 0),
    "slices that begin later": lambda x: torch.cat([x[..., 1:3], x[..., 3:5]], 0),
    "slices that end before": lambda x: torch.cat([x[..., :2], x[..., 2:4]], 0),
    "slices with steps": lambda x: torch.cat([x[..., 0::2], x[..., 1::2]], 0),
    "two tensors": lambda x: torch.cat([x.chunk(2, -1)[0], (x * 2).chunk(2, -1)[1]], 0),
}


class Calling(nn.Module):
    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        return self.made(x * 1.5) * 2.0


def joins(made: Callable[[Tensor], Tensor], free: bool) -> int:
    """How many concatenations are left; the graph gives the same, also at another size."""
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=64)}} if free else None
    gm = capture(Calling(made), CallInputs((torch.randn(4, 5, 6),), {}), shapes).module
    for x in (torch.randn(4, 5, 6), *([torch.randn(7, 5, 6)] if free else [])):
        assert torch.equal(gm(x), Calling(made)(x))
    return sum(is_call(n, aten.cat.default) for n in gm.graph.nodes)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("name", MOVED)
def test_moved(name: str, free: bool) -> None:
    assert joins(MOVED[name], free) == 0


@pytest.mark.parametrize("name", LEFT)
def test_left_as_they_are(name: str) -> None:
    assert joins(LEFT[name], True) == 1
