"""What the check of the whole model tells apart: rounding that a model makes grow, and a wrong number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Attention, Spelling
from torch import Tensor, nn

import attnopt
from attnopt.backends.reference import Reference
from attnopt.ir.spec import AttentionSpec
from attnopt.passes import LocalWindow

X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))


class Chaotic(nn.Module):
    """Each step of the logistic map doubles a difference."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.attention, self.steps = Attention(Spelling(core="matmul")), steps

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.attention(x))
        for _ in range(self.steps):
            y = 4 * y * (1 - y)
        return y


@pytest.mark.parametrize("policy", ["fuse", LocalWindow(2)], ids=["fuse", "window"])
def test_rounding_that_grows_is_told(policy: Any) -> None:
    with pytest.warns(attnopt.AttnoptWarning, match="amplifies rounding error"):
        fast = attnopt.optimize(Chaotic(18).eval(), policy, (X,))
    assert fast.report.sites[0].status == "rewritten"
    assert attnopt.optimize(Chaotic(2).eval(), policy, (X,)).report.warnings == ()


def test_a_small_error_that_grows_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = Reference.lower

    def wrong(self: Reference, spec: AttentionSpec) -> Any:
        attend = lower(self, spec)
        return lambda q, k, v, **given: attend(q, k, v, **given) * (1 + 3e-6)

    monkeypatch.setattr(Reference, "lower", wrong)
    with pytest.raises(attnopt.VerificationError, match="does not compute what local-window specifies"):
        attnopt.optimize(Chaotic(18).eval(), LocalWindow(2), (X,))
