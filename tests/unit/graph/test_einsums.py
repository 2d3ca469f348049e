"""Einsums of several tensors as products of two, and those that only scale as multiplications."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.graph.nodes import aten

SIZES = dict(zip("abcdnlhm", (2, 3, 5, 4, 2, 3, 5, 7), strict=True))


class Sum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *given: Tensor) -> Tensor:
        return torch.einsum(self.equation, *(x * 1.5 for x in given)) * 2.0


@pytest.mark.parametrize(
    ("equation", "left"),
    [
        ("nlhd,nhmd,nlh->nlhm", ["nlhd,nhmd->nlhm"]),
        ("ab,bc,cd->ad", ["ab,bc->ac", "ac,cd->ad"]),
        ("a,b,ab->ba", ["a,b->ab"]),
        ("abc,ca->cab", []),
        ("ba,abc->abc", []),
        ("ab,ba->ab", []),
        ("ab,cb->ac", ["ab,cb->ac"]),
        ("ab,ab->a", ["ab,ab->a"]),
        ("ab,b->a", ["ab,b->a"]),
    ],
)
def test_in_pairs(equation: str, left: list[str]) -> None:
    terms = equation.split("->")[0].split(",")
    given = tuple(torch.randn([SIZES[c] for c in term], dtype=torch.float64) for term in terms)
    module = capture(Sum(equation), CallInputs(given, {})).module
    assert [n.args[0] for n in module.graph.nodes if n.target is aten.einsum.default] == left
    torch.testing.assert_close(module(*given), Sum(equation)(*given))
