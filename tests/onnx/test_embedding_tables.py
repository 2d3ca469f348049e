"""Tables of embeddings in int8: each row keeps its scale, and what is no embedding stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import oracle
import pytest
import torch
from onnx_by_hand import DIM, HEADS, Parts, in_runtime
from onnx_core import run
from torch import Tensor, nn
from torch.nn import functional

import attnopt
from attnopt.onnx.export.embedding_tables import quantize_tables

VOCABULARY, LONGEST = 400, 128


class Encoder(nn.Module):
    """Tokens and positions are embedded; rotary angles and a bias by distance are looked up in tables, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(LONGEST, 32)
        with torch.no_grad():
            self.tokens.weight *= torch.logspace(-6, 1, VOCABULARY).unsqueeze(1)
        self.distances = nn.Embedding(2 * LONGEST, 4)
        self.angles = nn.Parameter(torch.rand(LONGEST, 8), requires_grad=False)
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.positions(at))
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        turns = self.angles[at].unsqueeze(1)
        bias = self.distances(at.unsqueeze(2) - at.unsqueeze(1) + LONGEST).permute(0, 3, 1, 2)
        made = functional.scaled_dot_product_attention(q * turns.cos(), k * turns.cos(), v, bias)
        return self.out(made.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def fast() -> attnopt.OptimizedModel:
    torch.manual_seed(0)
    return attnopt.optimize(Encoder().eval(), "fuse", (), called(2, 40), dynamic_shapes="auto", backend="sdpa")


def called(batch: int, length: int) -> dict[str, Tensor]:
    return {
        "ids": torch.randint(0, VOCABULARY, (batch, length)),
        "at": torch.randperm(LONGEST)[:length].repeat(batch, 1),
    }


def stored(file: Path) -> dict[tuple[int, ...], str]:
    """The types of the two-dimensional weights by their shapes."""
    return {
        tuple(w.dims): onnx.TensorProto.DataType.Name(w.data_type)
        for w in onnx.load(file).graph.initializer
        if len(w.dims) == 2
    }


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("flavor", ["onnxruntime", "standard"])
def test_embeddings_are_small_and_other_tables_as_they_were(
    fast: attnopt.OptimizedModel, how: Any, flavor: Any, tmp_path: Path
) -> None:
    file = tmp_path / "m.onnx"
    done = fast.export_onnx(file, flavor=flavor, quantize=how)
    assert done is not None
    assert done.tables == 2
    assert str(done).startswith(f"{how}: 4 products and 2 tables quantized, 0 products in float, ")
    types = stored(file)
    assert types[VOCABULARY, 32] == types[LONGEST, 32] == "INT8"
    assert types[LONGEST, 8] == types[2 * LONGEST, 4] == "FLOAT"
    for batch, length in ((2, 40), (1, 7), (3, 128)):
        x = called(batch, length)
        (got,), (want,) = run(file, tuple(x.values())), oracle.run(fast, (), x)
        assert 1e-4 < (got - want).norm() / want.norm() < {"int8": 0.03, "int4": 0.15}[how]


def test_each_row_has_its_own_scale(tmp_path: Path) -> None:
    """Also one that is zero, one that is next to it, and one whose largest number is negative; ids may count from the end."""
    p = Parts()
    p.weights["table"] = np.float32(
        np.random.default_rng(0).standard_normal((9000, DIM)) * np.logspace(-30, 30, 9000)[:, None]
    )
    p.weights["table"][3], p.weights["table"][4], p.weights["table"][5] = 0, 1e-44, -np.abs(p.weights["table"][5])
    p.node("Gather", ["table", "ids"], "y")
    file = saved(p, tmp_path)
    ids = torch.arange(-9000, 9000).reshape(2, 9000)
    (want,), (got,) = in_runtime(file, ids), small(file, ids, tables=1)
    step = want.abs().amax(-1, keepdim=True) / 127
    assert ((got - want).abs() <= 0.501 * step + 1e-38).all()
    assert (got - want).abs().max() > 0


def saved(p: Parts, folder: Path, **outputs: Any) -> Path:
    return p.save(
        folder / "m.onnx", {"ids": ["b", "n"]}, {"y": ["b", "n", DIM], **outputs}, types={"ids": onnx.TensorProto.INT64}
    )


def small(file: Path, ids: Tensor, tables: int, chosen: tuple[str, ...] = ()) -> list[Tensor]:
    """What ONNX Runtime returns once ``tables`` tables are in int8."""
    model = onnx_ir.load(file)
    assert quantize_tables(model, chosen) == tables
    made = file.with_name("small.onnx")
    onnx_ir.save(model, made)
    onnx.checker.check_model(str(made))
    return in_runtime(made, ids)


def test_readers_share_a_table(tmp_path: Path) -> None:
    p = Parts()
    table = p.weight("table", 500, DIM)
    p.node("Add", [p.node("Gather", [table, "ids"], "a"), p.node("Gather", [table, "others"], "b", axis=0)], "y")
    p.constant("others", np.arange(3))
    file = saved(p, tmp_path)
    ids = torch.tensor([[4, 499, 7]])
    (want,), (got,) = in_runtime(file, ids), small(file, ids, tables=1)
    assert 0 < (got - want).abs().max() < 0.02
    assert {k: v for k, v in stored(tmp_path / "small.onnx").items() if k[0] == 500} == {
        (500, DIM): "INT8",
        (500, 1): "FLOAT",
    }


def by_product(p: Parts, table: str) -> None:
    p.node("MatMul", [p.node("Gather", [table, "ids"], "x"), p.node("Transpose", [table], "t")], "z")
    p.node("Gather", [table, "ids"], "y")


def by_column(p: Parts, table: str) -> None:
    p.constant("some", np.arange(DIM))
    p.node("Gather", [p.node("Gather", [table, "some"], "x", axis=1), "ids"], "y")


def into_scores(p: Parts, table: str) -> None:
    x = p.node("Relu", [p.node("Gather", [table, "ids"], "x")], "r")
    p.node("MatMul", [p.node("MatMul", [x, p.node("Transpose", [x], "t", perm=[0, 2, 1])], "s"), x], "y")


def into_softmax(p: Parts, table: str) -> None:
    p.node("Softmax", [p.node("Gather", [table, "ids"], "x")], "y")


def into_rotary(p: Parts, table: str) -> None:
    p.node("RotaryEmbedding", [p.node("Gather", [table, "ids"], "x"), "cos", "sin", "at"], "y", num_heads=HEADS)
    p.constant("at", np.zeros((1, 3), np.int64))
    for name in ("cos", "sin"):
        p.constant(name, np.ones((500, DIM // HEADS // 2), np.float32))


def into_a_branch(p: Parts, table: str) -> None:
    x = p.node("Gather", [table, "ids"], "x")
    out = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)
    branch = onnx.helper.make_graph([onnx.helper.make_node("Exp", [x], ["inner"])], "branch", [], [out])
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", [x], ["inner"])], "other", [], [out])
    p.node("If", [p.constant("yes", np.asarray(True))], "made", then_branch=branch, else_branch=other)
    p.node("Softmax", ["made"], "y")


def not_finite(p: Parts, table: str) -> None:
    p.weights[table][7, 2] = np.nan
    p.node("Gather", [table, "ids"], "y")


def beside_large_weights(p: Parts, table: str) -> None:
    p.constant("large", np.ones((120 * 500, DIM), np.float32))
    p.node("Add", [p.node("Gather", [table, "ids"], "x"), p.node("ReduceSum", ["large"], "s")], "y")


@pytest.mark.parametrize(
    "reader",
    [by_product, by_column, into_scores, into_softmax, into_rotary, into_a_branch, not_finite, beside_large_weights],
    ids=lambda f: f.__name__,
)
def test_what_is_no_embedding_stays(reader: Any, tmp_path: Path) -> None:
    p = Parts()
    reader(p, p.weight("table", 500, DIM))
    file = p.save(
        tmp_path / "m.onnx",
        {"ids": ["b", 3]},
        {"y": [None, None, None]},
        types={"ids": onnx.TensorProto.INT64},
        opset=23,
        ir=11,
    )
    ids = torch.tensor([[4, 499, 6]])
    assert all(map(torch.equal, small(file, ids, tables=0), in_runtime(file, ids)))


def test_a_quantized_product_comes_before_the_attention(tmp_path: Path) -> None:
    p = Parts()
    x = p.node("Gather", [p.weight("table", 500, DIM), "ids"], "x")
    p.node("Add", [p.attention("a", x), x], "y")
    file = saved(p, tmp_path)
    products = tuple(f"a/{role}_m/MatMul" for role in "qkv")
    ids = torch.tensor([[4, 499, 7]])
    (want,), (got,) = in_runtime(file, ids), small(file, ids, 1, products)
    assert 0 < (got - want).norm() / want.norm() < 0.02
    small(file, ids, 0, products[1:])
