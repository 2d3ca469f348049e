"""Composite views are expanded where they stand; only writes in place make torch retrace the program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from attnopt.capture import functionalize
from attnopt.capture.capture import capture

VIEWS = {
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "H": lambda x: x.H,
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.flatten().unflatten(0, (x.shape[0], -1)),
    "narrow": lambda x: x.narrow(0, 1, x.shape[0] - 2),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "movedim": lambda x: x.movedim(0, 1),
    "ravel": lambda x: x.ravel(),
    "view_as": lambda x: x.flatten().view_as(x),
    "atleast_3d": lambda x: torch.atleast_3d(x),
    "tensor_split": lambda x: x.tensor_split([2, 4], 1)[1],
    "hsplit": lambda x: x.hsplit([1, 3])[2],
    "detach_": lambda x: torch.tensor([1.0, 2.0]).sum() * x,
}


class _Viewed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.view = VIEWS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.view(x) * 2


@pytest.mark.parametrize("free", [False, True], ids=("fixed", "free"))
@pytest.mark.parametrize("name", VIEWS)
def test_composite_views_need_no_second_trace(name: str, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExportedProgram, "run_decompositions", _retraced)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if free else None
    program = capture(_Viewed(name), (torch.randn(5, 7),), {}, shapes)
    assert not [
        n for n in program.module.graph.nodes if n.op == "call_function" and functionalize._is_composite_view(n)
    ]
    for sizes in ((5, 7), (11, 8), (6, 13))[: None if free else 1]:
        x = torch.randn(sizes)
        torch.testing.assert_close(program.module(x), _Viewed(name)(x), rtol=0, atol=0)


def _retraced(*_: object) -> None:
    raise AssertionError("the whole program was traced again")


def test_a_write_in_place_is_carried_out() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y.T[1] = 0.5
            return y + x.T.T

    x = torch.randn(4, 3)
    torch.testing.assert_close(capture(Written(), (x,), {}).module(x), Written()(x), rtol=0, atol=0)
