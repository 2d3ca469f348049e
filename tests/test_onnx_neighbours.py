"""What the export makes of the operators around the attentions: the same numbers, in a faster form."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import oracle
import pytest
import torch
from onnx_core import run
from torch import Tensor, nn
from torch.nn import functional

import attnopt


class Rms(nn.Module):
    """A normalisation as models of transformers write it; ``scale``: what it multiplies with."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Block(nn.Module):
    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.qkv, self.after = before, nn.Linear(32, 96), after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        o = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        made: Tensor = self.after(x + o)
        return made


def exported(model: nn.Module, path: Path, flavor: Any = "onnxruntime") -> Counter[str]:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 32)
    fast = attnopt.optimize(model.eval(), "fuse", x, dynamic_shapes="auto")
    fast.export_onnx(path, flavor=flavor)
    other = torch.randn(3, 7, 32)
    oracle.assert_same(run(path, (other,)), oracle.run(fast, (other,)))
    return Counter(n.op_type for n in onnx.load(path).graph.node)


@pytest.mark.parametrize("flavor", ["onnxruntime", "standard"])
def test_an_rms_normalization_is_one_operator(flavor: Any, tmp_path: Path) -> None:
    made = exported(Block(Rms(torch.rand(32)), Rms(torch.rand(32))), tmp_path / "m.onnx", flavor)
    assert made["RMSNormalization"] == 2
    assert not made["Reciprocal"]


@pytest.mark.parametrize("shape", [(1,), (12, 1), (1, 32)], ids=str)
def test_another_scale_is_left_as_it_is(shape: tuple[int, ...], tmp_path: Path) -> None:
    """One number for all features, or for each token: not what the operator is defined for."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 32)
    fast = attnopt.optimize(Block(Rms(torch.rand(shape)), nn.Identity()).eval(), "fuse", x)
    fast.export_onnx(tmp_path / "m.onnx")
    oracle.assert_same(run(tmp_path / "m.onnx", (x,)), oracle.run(fast, (x,)))
    assert not any(n.op_type == "RMSNormalization" for n in onnx.load(tmp_path / "m.onnx").graph.node)


def test_onnx_runtime_does_not_fuse_a_sum_into_its_normalization(tmp_path: Path) -> None:
    """With ``Add`` it would, and take several times as long."""

    def loaded(flavor: str) -> Counter[str]:
        made = exported(Block(nn.LayerNorm(32), nn.LayerNorm(32)), tmp_path / "m.onnx", flavor)
        assert made["LayerNormalization"] == 2
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
        return Counter(n.op_type for n in onnx.load(tmp_path / "loaded.onnx").graph.node)

    assert loaded("onnxruntime")["SkipLayerNormalization"] == 0
    assert loaded("standard")["SkipLayerNormalization"] == 1
