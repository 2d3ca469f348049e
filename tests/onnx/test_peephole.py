"""What the export makes of the operators around the attentions: the same numbers, in a faster form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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


def test_another_scale_is_left_as_it_is(tmp_path: Path) -> None:
    """One number for all features, or for each token: not what the operator is defined for."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 32)
    model = nn.Sequential(*(Block(Rms(torch.rand(shape)), nn.Identity()) for shape in ((1,), (12, 1), (1, 32))))
    fast = attnopt.optimize(model.eval(), "fuse", x)
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


# ---------------------------------------------------------------- rotary positions
Turn = Callable[[Tensor], Tensor]


class Rotated(nn.Module):
    """An attention whose queries and keys [B, H, L, 8] are turned."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.qkv, self.turn = nn.Linear(32, 96), turn

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        o = functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return x + o.transpose(1, 2).flatten(2)


def angles(length: int, size: int) -> Tensor:
    """[L, D], both halves the same."""
    once = torch.arange(length)[:, None] * 10.0 ** -(torch.arange(size // 2) / size)
    return torch.cat([once, once], -1)


def halves_swapped(x: Tensor) -> Tensor:
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def turned(x: Tensor) -> Tensor:
    at = angles(x.shape[2], x.shape[3])
    return x * at.cos() + halves_swapped(x) * at.sin()


def scaled(x: Tensor) -> Tensor:
    at = angles(x.shape[2], x.shape[3])[None, None]
    return halves_swapped(x) * (at.sin() * 1.1) + (at.cos() * 1.1) * x


def in_part(x: Tensor) -> Tensor:
    return torch.cat([turned(x[..., :4]), x[..., 4:]], -1)


def the_other_way(x: Tensor) -> Tensor:
    at = angles(x.shape[2], x.shape[3])
    return x * at.cos() - halves_swapped(x) * at.sin()


def other_halves(x: Tensor) -> Tensor:
    at = angles(x.shape[2], x.shape[3])
    return x * at.cos() + torch.cat([x[..., 4:], -x[..., :4]], -1) * at.sin()


def one_uneven_table(x: Tensor) -> Tensor:
    at = angles(x.shape[2], x.shape[3])
    return x * (at + torch.arange(8)).cos() + halves_swapped(x) * at.sin()


def tables_for_each_head(x: Tensor) -> Tensor:
    at = angles(x.shape[2], x.shape[3]) * torch.arange(1, 5)[:, None, None]
    return x * at.cos() + halves_swapped(x) * at.sin()


def one_angle_for_all(x: Tensor) -> Tensor:
    at = angles(2, x.shape[3])[1:]
    return x * at.cos() + halves_swapped(x) * at.sin()


@pytest.mark.parametrize(("turn", "flavor"), [(turned, "onnxruntime"), (scaled, "standard"), (in_part, "onnxruntime")])
def test_a_rotation_is_one_operator(turn: Turn, flavor: Any, tmp_path: Path) -> None:
    made = exported(Rotated(turn), tmp_path / "m.onnx", flavor)
    assert made["RotaryEmbedding"] == 2
    assert not made["Neg"]


def test_a_rotation_at_fixed_sizes(tmp_path: Path) -> None:
    """The tables are constants then."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 32)
    fast = attnopt.optimize(Rotated(turned).eval(), "fuse", x)
    fast.export_onnx(tmp_path / "m.onnx")
    oracle.assert_same(run(tmp_path / "m.onnx", (x,)), oracle.run(fast, (x,)))
    assert sum(n.op_type == "RotaryEmbedding" for n in onnx.load(tmp_path / "m.onnx").graph.node) == 2


def test_what_only_looks_like_a_rotation_is_left_as_it_is(tmp_path: Path) -> None:
    turns = (the_other_way, other_halves, one_uneven_table, tables_for_each_head, one_angle_for_all)
    assert not exported(nn.Sequential(*map(Rotated, turns)), tmp_path / "m.onnx")["RotaryEmbedding"]
