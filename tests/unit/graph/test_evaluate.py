"""What is the same at every call, and cheap to compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.graph.evaluate import is_plain

MADE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "positions": (lambda x: torch.arange(x.shape[0]), True),
    "drawn": (lambda x: torch.rand(x.shape[0]), False),
    "drawn in the form of another": (lambda x: torch.rand_like(torch.ones(3)), False),
    "a product": (lambda x: torch.ones(3, 3) @ torch.ones(3, 3), False),
    "an outer product": (lambda x: torch.arange(3)[:, None] * torch.arange(3), True),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_plain(name: str) -> None:
    make, plain = MADE[name]

    class Made(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, make(x)

    gm = capture(Made(), CallInputs((torch.zeros(3),), {})).module
    (end,) = [n for n in gm.graph.nodes if n.op == "output"]
    assert is_plain(end.all_input_nodes[-1]) is plain
