"""Sizes that are valid at one number alone are numbers, before anything is rewritten."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from attnopt.capture.capture import capture


class _Folded(nn.Module):
    """One window of the example's length, repeated along the batch."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        apart = x.unflatten(0, (-1, self.windows))
        return (apart @ apart.transpose(-1, -2)).flatten(0, 1)


@pytest.mark.parametrize(("batch", "windows", "fixed"), [(2, 2, True), (6, 2, False), (9, 9, True), (18, 9, False)])
def test_a_size_that_only_the_example_has(batch: int, windows: int, fixed: bool) -> None:
    model, x = _Folded(windows), torch.randn(batch, 5, 4)
    program = capture(model, (x,), {}, ({0: Dim.AUTO, 1: Dim.AUTO},))
    sizes = next(n for n in program.module.graph.nodes if n.op == "placeholder").meta["val"].shape
    assert isinstance(sizes[0], int) == fixed
    assert not isinstance(sizes[1], int)
    more = torch.randn(batch if fixed else 3 * windows, 7, 4)
    torch.testing.assert_close(program.module(more), model(more), rtol=0, atol=0)
