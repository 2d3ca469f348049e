"""Operators for which torch's ONNX exporter has no form: each beside an attention, at other sizes too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from onnx_core import run
from torch import Tensor, nn
from torch.nn import functional

import attnopt
from attnopt.onnx.export.complex_as_real import ON_PAIRS, in_pairs


class Beside(nn.Module):
    """An attention over [B, L, 16], and something after it."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.qkv, self.after = nn.Linear(16, 48), after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        made: Tensor = self.after(x + o)
        return made


def check(after: nn.Module, path: Path, flavor: Any = "onnxruntime") -> None:
    torch.manual_seed(0)
    model = Beside(after).eval()
    fast = attnopt.optimize(model, "fuse", torch.randn(2, 12, 16), dynamic_shapes="auto")
    fast.export_onnx(path, flavor=flavor)
    for sizes in ((2, 12), (3, 7)):
        x = torch.randn(*sizes, 16)
        oracle.assert_same(run(path, (x,)), [model(x)])


# ---------------------------------------------------------------- axes
class Squeezed(nn.Module):
    """An axis that is longer than 1 stays, and ONNX's Squeeze takes none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1).unsqueeze(1).squeeze((1, 2)).squeeze(-1)


def test_squeeze_of_a_longer_axis(tmp_path: Path) -> None:
    check(Squeezed(), tmp_path / "model.onnx")


# ---------------------------------------------------------------- groups of rows
class Experts(nn.Module):
    """Each token goes to the expert that its number says; one may get none, and the last tokens go to none."""

    def __init__(self, ends: tuple[int, ...], transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(ends), *((5, 16) if transposed else (16, 5))))
        self.transposed = transposed
        self.register_buffer("ends", torch.tensor(ends, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        import transformers.integrations.moe  # noqa: F401 - defines the operator

        weight = self.weight.mT if self.transposed else self.weight
        return torch.ops.transformers.grouped_mm_fallback(x.flatten(0, 1), weight, self.ends)


@pytest.mark.parametrize(("ends", "transposed"), [((3, 3, 10, 15), False), ((0, 20, 21, 21), True), ((0, 0), False)])
def test_groups_of_rows(ends: tuple[int, ...], transposed: bool, tmp_path: Path) -> None:
    check(Experts(ends, transposed), tmp_path / "m.onnx", "standard")


class Routed(nn.Module):
    """Tokens sorted by the expert that they choose, which the operator was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 6)
        self.weight = nn.Parameter(torch.randn(6, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        import transformers.integrations.moe  # noqa: F401 - defines the operator

        tokens = x.flatten(0, 1)
        expert, order = self.gate(tokens).argmax(-1).sort()
        ends = (expert[:, None] <= torch.arange(6)).sum(0)
        made = torch.ops.transformers.grouped_mm_fallback(tokens[order], self.weight, ends)
        return made[order.argsort()].view_as(x)


def test_groups_that_the_input_decides(tmp_path: Path) -> None:
    check(Routed(), tmp_path / "m.onnx")


# ---------------------------------------------------------------- complex numbers
Arrange = Callable[[Tensor, Tensor], Tensor]
ARRANGED: dict[str, Arrange] = {
    "unsqueeze": lambda unit, _: unit.unsqueeze(0),
    "unsqueeze from the end": lambda unit, _: unit.unsqueeze(-3),
    "unsqueeze behind, select": lambda unit, _: unit.unsqueeze(-1).select(-1, 0),
    "expand": lambda unit, pairs: unit.expand(pairs.shape[0], -1, -1),
    "repeat": lambda unit, pairs: unit[:, :4].repeat(1, 2),
    "squeeze": lambda unit, _: unit[None, None].squeeze((0, -3)),
    "index_select": lambda unit, _: unit.index_select(-1, torch.arange(7, -1, -1)),
}


class Turned(nn.Module):
    """Pairs of features [B, L, 8] times unit numbers [L, 8], as each of ``arranged`` lays these out."""

    def __init__(self, *arranged: Arrange) -> None:
        super().__init__()
        self.arranged = arranged

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * torch.arange(8) / 3
        unit = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.unflatten(-1, (8, 2)).contiguous())
        for arrange in self.arranged:
            pairs = pairs * arrange(unit, pairs)
        return torch.view_as_real(pairs).flatten(-2)


def captured(model: nn.Module) -> tuple[torch.fx.GraphModule, Tensor]:
    x = torch.randn(2, 5, 16)
    return torch.export.export(model, (x,)).run_decompositions({}).module(), x


@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED)
def test_complex_numbers_are_arranged_in_pairs(arrange: Arrange) -> None:
    gm, x = captured(Turned(arrange))
    want = gm(x)
    in_pairs(gm)
    complex_still = [
        n.target for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_complex()
    ]
    assert not set(complex_still) & set(ON_PAIRS)
    assert torch.ops.aten.view_as_real.default in {n.args[0].target for n in gm.graph.nodes if n.target in ON_PAIRS}
    assert torch.equal(gm(x), want)


def test_arranged_complex_numbers_are_exported(tmp_path: Path) -> None:
    check(Turned(*ARRANGED.values()), tmp_path / "m.onnx")


def test_split_complex_numbers_are_exported(tmp_path: Path) -> None:
    check(Turned(lambda unit, _: torch.cat(unit.split((3, 4, 1), -1)[::-1], -1)), tmp_path / "m.onnx")


def test_real_numbers_are_left_alone() -> None:
    gm, _ = captured(Beside(nn.Unflatten(-1, (2, 8))))
    before = [str(n) for n in gm.graph.nodes]
    in_pairs(gm)
    assert [str(n) for n in gm.graph.nodes] == before


# ---------------------------------------------------------------- conversions
class OneMinus(nn.Module):
    """Multiplied with a number less an integer, or less what is narrower, as masks are written."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsub((x > 0).to(self.dtype), 1.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float32])
def test_a_number_less_a_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    check(OneMinus(dtype), tmp_path / "m.onnx")


class Angles(nn.Module):
    """Integer positions times frequencies, as one einsum; ``length``: known when the file is written, or an input's."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("frequencies", torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[0] if self.length is None else self.length)
        return x + torch.einsum("i, j -> i j", places, self.frequencies).sin().sum(0)


@pytest.mark.parametrize("length", [7, None])
def test_an_einsum_of_integers_and_floats(length: int | None, tmp_path: Path) -> None:
    check(Angles(length), tmp_path / "m.onnx")
