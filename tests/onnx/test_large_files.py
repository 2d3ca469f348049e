"""Weights that do not fit in one file: stored beside it, or refused; with a low limit, and once with more than 2 GiB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from test_decoder import optimized
from tiny_decoder import END
from torch import Tensor, nn
from torch.nn import functional as F
from variants import mostly_slow

import attnopt
from attnopt.onnx.export import write_file

NEEDED = 10 * 2**30  # bytes of memory that are free, for a model of 2.2


class Layer(nn.Module):
    """Attention, and a wide layer after it.  ``width``: of that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, width, bias=False), nn.Linear(width, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


def run(file: Path, x: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_file, "ROOM_IN_FILE", 20_000)


@pytest.mark.usefixtures("low_limit")
@pytest.mark.parametrize("quantize", mostly_slow([None, "int8", "int4"], "int8"))
def test_weights_beyond_the_limit(quantize: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 9, 64)
    fast = attnopt.optimize(Layer(512).eval(), "fuse", (x,))
    fast.export_onnx(tmp_path / "m.onnx", quantize=quantize)
    (data,) = tmp_path.glob("m.onnx.*.data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", data.name]
    assert (tmp_path / "m.onnx").stat().st_size < data.stat().st_size
    (got,), (want,) = run(tmp_path / "m.onnx", x), oracle.run(fast, (x,))
    assert float((got - want).norm() / want.norm()) < (1e-5 if quantize is None else 0.1)
    with pytest.raises(attnopt.ExportError, match="GiB of weights exceed the 2 GiB limit of one ONNX file"):
        fast.export_onnx(tmp_path / "n.onnx", quantize=quantize, external_data=False)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("low_limit")
@pytest.mark.slow
def test_a_decoder_beyond_the_limit(tmp_path: Path) -> None:
    optimized().export_decoder(tmp_path / "m", context_length=32, eos_token_id=END)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["genai_config.json", "model.onnx", "model.onnx.data"]


@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < NEEDED, reason="needs 10 GiB of free memory"
)
def test_more_than_two_gibibytes(tmp_path: Path) -> None:
    x = torch.randn(1, 8, 64)
    model = Layer(4_600_000).eval()
    fast = attnopt.optimize(model, "fuse", (x,))
    with pytest.raises(attnopt.ExportError, match=r"2\.2 GiB of weights exceed"):
        fast.export_onnx(tmp_path / "n.onnx", external_data=False)
    fast.export_onnx(tmp_path / "m.onnx")
    (data,) = tmp_path.glob("m.onnx.*.data")
    assert data.stat().st_size > 2**31
    oracle.assert_same(run(tmp_path / "m.onnx", x), oracle.run(fast, (x,)))
