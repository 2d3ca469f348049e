"""Transforms of a model as products with constant matrices, against torch in double precision and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt

pytestmark = pytest.mark.usefixtures("one_torchlib")


class Mixes(nn.Module):
    """A Fourier filter beside an attention, as a hybrid of both has it."""

    def __init__(self, length: int, filtered: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.filtered, self.weight = filtered, nn.Parameter(torch.randn(length, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.filtered(x, self.weight)


def one_axis(x: Tensor, w: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.fft.rfft(w, dim=0), n=x.shape[1], dim=1)


def last_axis(x: Tensor, w: Tensor) -> Tensor:
    return torch.fft.ifft(torch.fft.fft(x.mT + 0j) * w.mT).real.mT


@pytest.mark.parametrize("filtered", [one_axis, last_axis])
@pytest.mark.parametrize("length", [9, 12])
@pytest.mark.slow
def test_a_model_with_transforms(filtered: Any, length: int, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model, x = Mixes(length, filtered).eval(), torch.randn(3, length, 8)
    fast = attnopt.optimize(model, "fuse", (x,))
    fast.export_onnx(tmp_path / "m.onnx")
    assert "DFT" not in {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-4)
