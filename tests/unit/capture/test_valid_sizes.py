"""Sizes that are valid at one number alone are numbers, before anything is rewritten."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.capture.signature import check_inputs
from attnopt.capture.valid_sizes import sizes_that_fit
from attnopt.errors import CaptureError
from attnopt.graph.evaluate import symbols


class _Folded(nn.Module):
    """One window of the example's length, repeated along the batch."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        apart = x.unflatten(0, (-1, self.windows))
        return (apart @ apart.transpose(-1, -2)).flatten(0, 1)


class _NamedAsBuiltins(nn.Module):
    """fx calls these arguments ``input_1`` and ``max_1``."""

    def forward(self, input: Tensor, max: Tensor) -> Tensor:
        return _Folded(2)(input) + max.sum() * (2 if max.shape[0] % 3 == 0 else 1)


def test_arguments_that_are_called_as_builtins() -> None:
    program = capture(_NamedAsBuiltins(), CallInputs((torch.randn(2, 5, 4), torch.randn(6)), {}), "auto")
    assert {"input[0] = 2", "input[2] = 4", "max[0] % 3 == 0"} <= set(program.fixed_axes)
    with pytest.raises(CaptureError, match=r"input has length 4 along axis 0, but was captured for 2 only"):
        check_inputs(program.module, (torch.randn(4, 5, 4), torch.randn(6)), {}, program.fixed_axes)
    fits = sizes_that_fit(program.module.graph, program.fixed_axes)
    length, other = symbols(program.module.graph)
    assert fits({length: 7, other: 9})
    assert not fits({length: 7, other: 8})


@pytest.mark.parametrize(("batch", "windows", "fixed"), [(2, 2, True), (6, 2, False), (9, 9, True), (18, 9, False)])
def test_a_size_that_only_the_example_has(batch: int, windows: int, fixed: bool) -> None:
    model, x = _Folded(windows), torch.randn(batch, 5, 4)
    program = capture(model, CallInputs((x,), {}), ({0: Dim.AUTO, 1: Dim.AUTO},))
    sizes = next(n for n in program.module.graph.nodes if n.op == "placeholder").meta["val"].shape
    assert isinstance(sizes[0], int) == fixed
    assert not isinstance(sizes[1], int)
    more = torch.randn(batch if fixed else 3 * windows, 7, 4)
    torch.testing.assert_close(program.module(more), model(more), rtol=0, atol=0)
