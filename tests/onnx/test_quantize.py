"""Quantized files: weights of products are small, everything else is as before, and what quantization costs is measured."""

from __future__ import annotations

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import oracle
import pytest
import torch
from onnx_by_hand import DIM, Parts, in_runtime, plain
from onnx_core import forms, run
from torch import Tensor, nn
from torch.nn import functional

import attnopt
from attnopt import Input
from attnopt.onnx.export import quantizer
from attnopt.onnx.export.deviation import BOUNDS, deviation
from attnopt.onnx.export.weight_products import prepared
from attnopt.passes import LocalWindow, ScaleHeads

LOST = {"int8": 0.02, "int4": 0.15}  # relative error of weights drawn from a normal distribution, in one layer and two


class Encoder(nn.Module):
    """One attention, and a pooled head that torch exports as a Gemm; 40 features are no multiple of the blocks of int4."""

    def __init__(self, dead: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(40, 120), nn.Linear(40, 40)
        self.head = nn.Linear(40, 6)
        self.alive = torch.tensor([0.0 if dead else 1.0] + [1.0] * 39)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[1] % 2 == 0:
            x = x * 1.5
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 10)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return {"hidden": x, "classes": self.head(x.mean(1) * self.alive)}


POLICY = [LocalWindow(4), ScaleHeads(Input("gains"))]


@pytest.fixture(scope="module")
def fast() -> attnopt.OptimizedModel:
    """A window, and gains that each call brings."""
    torch.manual_seed(0)
    x = {"x": torch.randn(2, 40, 40), "gains": torch.rand(2, 4)}
    return attnopt.optimize(Encoder().eval(), POLICY, (), x, dynamic_shapes="auto", backend="sdpa")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def kinds(graph: onnx.GraphProto) -> list[str]:
    """Of the nodes, also of those in loops."""
    inner = [g for n in graph.node for a in n.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    return [f"{n.domain}.{n.op_type}".lstrip(".") for n in graph.node] + [k for g in inner for k in kinds(g)]


PRODUCTS = {
    ("int8", "onnxruntime"): "MatMulInteger",
    ("int8", "standard"): "MatMulInteger",
    ("int4", "onnxruntime"): "com.microsoft.MatMulNBits",
    ("int4", "standard"): "DequantizeLinear",
}


@pytest.mark.parametrize(("how", "flavor"), PRODUCTS)
def test_weights_are_small_and_all_else_is_as_before(
    fast: attnopt.OptimizedModel, how: Any, flavor: Any, tmp_path: Path
) -> None:
    file = tmp_path / "m.onnx"
    done = fast.export_onnx(file, flavor=flavor, quantize=how)
    model = onnx.load(file)
    found = kinds(model.graph)
    assert done is not None
    assert done.products == found.count(PRODUCTS[how, flavor]) == 5  # q, k, v, out, head
    assert done.floating == 0
    assert found.count("Attention") == 1
    assert forms(file) == ["blocks"]
    assert flavor == "onnxruntime" or not any(kind.startswith("com.microsoft") for kind in found)
    assert [i.name for i in model.graph.input] == ["x", "gains"]
    assert [o.name for o in model.graph.output] == ["hidden", "classes"]
    said = {p.key: p.value for p in model.metadata_props}
    assert len(said) == len(model.metadata_props)
    assert (model.producer_name, said["attnopt.flavor"]) == ("attnopt", flavor)
    assert json.loads(said["attnopt.quantization"])["cosine"] == done.cosine
    assert done.bytes_before > done.bytes_after == file.stat().st_size
    assert done.sizes == 3
    assert 1 - (done.cosine or 0) < (done.relative_error or 1) ** 2
    for batch, length in ((2, 40), (1, 6), (3, 300)):
        x = (torch.randn(batch, length, 40), torch.rand(batch, 4))
        for got, want in zip(run(file, x), oracle.run(fast, x[:1], {"gains": x[1]}), strict=True):
            assert 1e-4 < (got - want).norm() / want.norm() < LOST[how]
    with pytest.raises(Exception, match=r"requires .*% 2"):
        run(file, (torch.randn(2, 41, 40), torch.rand(2, 4)))


def test_onnx_runtime_joins_biases_with_int8_products(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    fast.export_onnx(tmp_path / "m.onnx", quantize="int8")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options)
    nodes = [n for n in onnx.load(tmp_path / "loaded.onnx").graph.node if n.domain == "com.microsoft"]
    place = {"DynamicQuantizeMatMul": 4, "MatMulIntegerToFloat": 6}  # of the bias
    biased = [n for n in nodes if n.op_type in place and len(n.input) > place[n.op_type] and n.input[place[n.op_type]]]
    assert len(biased) == 5  # q, k, v, out, head


@pytest.mark.parametrize("turned", [False, True])
def test_sums_keep_their_order(turned: bool, tmp_path: Path) -> None:
    """A bias that comes third is not added before the second addend."""
    p, q = ("c, p", "r, q") if turned else ("p, c", "q, r")
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        sums (float[1, 2, 4] x, float[1, 2, 4] r) => (float[1, 2, 4] a, float[1, 2, 4] b, float[1, 2, 4] d)
        {{ p = MatMul(x, w)  a = Sum({p}, r)  q = MatMul(x, u)  b = Sum({q}, c)  o = MatMul(x, t)  d = Sum(r, r, o, c) }}
    """)
    torch.manual_seed(0)
    for name, shape in {"w": (4, 4), "u": (4, 4), "t": (4, 4), "c": (4,)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(torch.randn(shape).numpy(), name))
    made = onnx_ir.from_proto(model)
    prepared(made)
    assert [n.op_type for n in made.graph] == ["MatMul", "Add", "Sum", "MatMul", "Sum", "MatMul", "Sum"]
    onnx.save(model, tmp_path / "before.onnx")
    onnx_ir.save(made, tmp_path / "after.onnx")
    x = (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    assert all(map(torch.equal, in_runtime(tmp_path / "after.onnx", *x), in_runtime(tmp_path / "before.onnx", *x)))


def test_external_weights(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    x = (torch.randn(2, 40, 40), torch.rand(2, 4))
    fast.export_onnx(tmp_path / "m.onnx", quantize="int8")
    want = run(tmp_path / "m.onnx", x)
    done = fast.export_onnx(tmp_path / "m.onnx", quantize="int8", external_data=True)
    (data,) = tmp_path.glob("m.onnx.*.data")
    assert names(tmp_path) == ["m.onnx", data.name]
    assert done is not None
    assert done.bytes_after == (tmp_path / "m.onnx").stat().st_size + data.stat().st_size
    assert all(map(torch.equal, run(tmp_path / "m.onnx", x), want))


def raising(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (ValueError("no such tensor"), attnopt.ExportError, "quantizer failed: ValueError: no such tensor"),
        (OSError(errno.ENOSPC, "No space left on device"), attnopt.ArchiveError, "m.onnx: No space left"),
        (
            ModuleNotFoundError("No module named 'ml_dtypes'", name="ml_dtypes"),
            attnopt.ExportError,
            "pip install ml_dtypes",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_a_quantizer_that_fails_leaves_the_older_model(
    fast: attnopt.OptimizedModel, error: Any, expected: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    monkeypatch.setattr(quantizer, "_dynamic", raising(error))
    with pytest.raises(expected, match=said):
        fast.export_onnx(tmp_path / "m.onnx", quantize="int8", external_data=True)
    assert names(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_what_cannot_be_quantized(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=r"quantize='int5'\n  hint: use \"int8\", \"int4\", or None"):
        fast.export_onnx(tmp_path / "m.onnx", quantize="int5")  # type: ignore[arg-type]
    with pytest.raises(attnopt.ArchiveError, match="it is a folder"):
        fast.export_onnx(tmp_path, quantize="int8")
    double = attnopt.optimize(Encoder().double().eval(), "fuse", (torch.randn(2, 4, 40).double(),))
    with pytest.raises(attnopt.ExportError, match="no product with constant float32 weights"):
        double.export_onnx(tmp_path / "m.onnx", quantize="int8")
    assert names(tmp_path) == []


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_too_much_loss_is_refused(how: Any, tmp_path: Path) -> None:
    """Large weights of a feature that is always zero: all others round to zero."""
    model = Encoder(dead=True).eval()
    model.head.weight.data[:, 0] = 1e4
    fast = attnopt.optimize(model, "fuse", (torch.randn(2, 4, 40),))
    said = rf"output 'classes' of the {how} file has a cosine of .* for inputs of \(2, 4, 40\), so nothing was written"
    with pytest.raises(attnopt.ExportError, match=said):
        fast.export_onnx(tmp_path / "m.onnx", quantize=how)
    assert names(tmp_path) == []
    done = fast.export_onnx(tmp_path / "m.onnx", quantize=how, verify=False)
    assert str(done).endswith("not checked")
    assert len(run(tmp_path / "m.onnx", (torch.randn(2, 4, 40),))) == 2


ONES, NAN = torch.ones(4), torch.tensor([1.0, float("nan"), 1.0, 1.0])


@pytest.mark.parametrize(
    ("got", "want", "said"),
    [
        ([NAN], [ONES], "has NaN or infinities"),
        ([ONES], [NAN], "has NaN or infinities"),
        ([], [ONES], "has 0 outputs now, and the model 1"),
        ([ONES[:3]], [ONES], r"is \(3,\) now, expected \(4,\)"),
        ([ONES.long()], [ONES.long()], "no floating-point numbers"),
        ([1.3 * ONES], [ONES], r"a cosine of 1.000 .* a relative error of 0.3 "),
        ([torch.tensor([1.0, 0.22])], [torch.tensor([1.0, 0.0])], "a cosine of 0.977 .* a relative error of 0.22 "),
        ([0 * ONES], [ONES], "a cosine of 0.000"),
        ([ONES], [0 * ONES], "a relative error of inf"),
    ],
)
def test_what_is_too_far(got: list[Tensor], want: list[Tensor], said: str) -> None:
    with pytest.raises(attnopt.ExportError, match=said):
        deviation(got, want, ["y"], "int8", "now", "leave quantize out")


def test_deviation_is_of_the_worst_output() -> None:
    x, y = torch.randn(300), torch.randn(300)
    y = y - x * (x @ y) / (x @ x)
    noisy = x + 0.1 * y * x.norm() / y.norm()
    found = deviation([x, noisy, x.long(), 0 * x, NAN], [x, x, y.long(), 0 * x, NAN], "abcde", "int8", "now", "")
    assert found.relative_error == pytest.approx(0.1)
    assert found.cosine == pytest.approx(1 / 1.01**0.5)
    assert BOUNDS["int4"].cosine < BOUNDS["int8"].cosine < 1


# ---------------------------------------------------------------- files that are already there
def test_weights_become_what_the_quantizers_take(tmp_path: Path) -> None:
    """Shared, transposed and stored in nodes; an embedding that is read as it is, too; nodes without names."""
    p = Parts()
    table = p.weight("table", DIM, DIM)
    x = p.node("Gather", [table, "ids"], "embedded")
    for i in range(2):
        x = p.node("Gemm", [x, p.weight("shared", DIM, DIM), p.weight(f"b{i}", DIM)], f"g{i}", transB=1)
    x = p.node("Gemm", [x, table], "g2", transB=1, name="")
    x = p.node("MatMul", [x, table], "m", name="")
    stored = onnx.numpy_helper.from_array(np.eye(DIM, dtype=np.float32)[::-1].copy(), "c")
    x = p.node("MatMul", [x, p.node("Constant", [], "eye", value=stored)], "e")
    x = p.node("MatMul", [x, p.node("Transpose", [table], "turned", perm=[1, 0])], "t")
    p.node("Gemm", [x, table], "y", alpha=0.5)
    types = {"ids": onnx.TensorProto.INT64}
    file = p.save(tmp_path / "m.onnx", {"ids": ["n"]}, {"y": ["n", DIM]}, types=types)
    model = onnx_ir.load(file)
    found = prepared(model)
    assert len(set(found.chosen)) == 6
    assert len(found.others) == 1  # it scales
    weights = [n.inputs[1] for n in model.graph if n.name in found.chosen]
    assert len(set(weights)) == 4
    assert all(n.op_type == "MatMul" for v in weights if v is not None for n, _ in v.uses())
    onnx_ir.save(model, tmp_path / "prepared.onnx")
    ids = torch.randint(0, DIM, (7,))
    oracle.assert_same(in_runtime(tmp_path / "prepared.onnx", ids), in_runtime(file, ids))


def test_a_file_in_place(tmp_path: Path) -> None:
    file, out = plain(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    x = torch.randn(2, 9, DIM)
    fast = attnopt.optimize(file, LocalWindow(2), (x,))
    with pytest.raises(attnopt.ExportError, match="int4 needs opset 21 or later, and the file has opset 13"):
        fast.export_onnx(out, quantize="int4", flavor="standard")
    done = fast.export_onnx(out, quantize="int8")
    assert done is not None
    assert done.products == 4
    said = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert said["author"] == "somebody"
    assert onnx.load(out).producer_name == "by hand"
    x = torch.randn(3, 30, DIM)
    (got,), (want,) = run(out, (x,)), oracle.run(fast, (x,))
    assert 1e-4 < (got - want).norm() / want.norm() < 0.05


def test_the_root_logger_stays_as_it_is(
    fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime.quantization configures it, and writes to it."""
    for name in [n for n in sys.modules if n.startswith("onnxruntime.quantization")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    for how in ("int8", "int4"):
        fast.export_onnx(tmp_path / "m.onnx", quantize=how, verify=False)
    assert (logging.root.handlers, logging.root.level) == ([], level)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", [None, "int8"])
def test_openvino_runs_the_standard_flavor(how: Any, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    fast = attnopt.optimize(Encoder().eval(), "fuse", (torch.randn(2, 40, 40),), dynamic_shapes="auto", backend="sdpa")
    fast.export_onnx(tmp_path / "m.onnx", flavor="standard", quantize=how)
    assert forms(tmp_path / "m.onnx") == ["Attention"]
    compiled = openvino.Core().compile_model(str(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch, length in ((2, 40), (1, 6)):
        x = torch.randn(batch, length, 40)
        got, want = [torch.from_numpy(o) for o in compiled([x.numpy()]).to_tuple()], oracle.run(fast, (x,))
        if how is None:
            oracle.assert_same(got, want)
            continue
        for g, w in zip(got, want, strict=True):
            assert 1e-4 < (g - w).norm() / w.norm() < LOST[how]
