"""Files rewritten in place: what is not understood stays, names and order stay, and what is written is no larger."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx_by_hand import DIM, Parts, contrib, control, in_runtime, plain, recurrent
from torch import Tensor, nn

import attnopt
from attnopt.onnx.load import operators
from attnopt.onnx.load.load import opened
from attnopt.passes import LocalWindow, PruneHeads


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def declared(values: Any) -> list[Any]:
    return [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]


def assert_kept(before: Path, after: Path) -> None:
    """Everything but the attentions is as it was."""
    old, new = onnx.load(before), onnx.load(after)
    assert declared(new.graph.input) == declared(old.graph.input)
    assert declared(new.graph.output) == declared(old.graph.output)
    assert (new.producer_name, new.doc_string) == (old.producer_name, old.doc_string)
    assert {p.key: p.value for p in new.metadata_props}["author"] == "somebody"
    there = {n.SerializeToString() for n in new.graph.node}
    lost = [n for n in old.graph.node if n.SerializeToString() not in there]
    assert all(n.op_type in ATTENTION for n in lost), [n.op_type for n in lost]
    assert new.opset_import[0].version == old.opset_import[0].version


ATTENTION = {"MatMul", "Add", "Reshape", "Transpose", "Mul", "Softmax", "DequantizeLinear", "Cast"}

FILES: dict[str, tuple[Callable[[Path], Path], int, Any]] = {
    "operators of ONNX Runtime": (contrib, 2, lambda b, t: (numbers(b, t, DIM),)),
    "a branch and a loop": (control, 2, lambda b, t: (numbers(b, t, DIM),)),
    "an LSTM": (recurrent, 1, lambda b, t: (numbers(b, t, DIM), 0.1 * numbers(b, 1, 1, t))),
}


@pytest.mark.parametrize(("make", "sites", "inputs"), FILES.values(), ids=FILES)
def test_what_is_not_read_stays(
    make: Any, sites: int, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file, out = make(tmp_path / "m.onnx"), tmp_path / "fast.onnx"
    fast = attnopt.optimize(file, "fuse", inputs(1, 7))
    assert len(fast.sites) == sites
    fast.export_onnx(out)
    assert_kept(file, out)
    for sizes in ((1, 7), (2, 7), (3, 12)):
        oracle.assert_same(in_runtime(out, *inputs(*sizes)), in_runtime(file, *inputs(*sizes)))
    assert not list((tmp_path / "here").iterdir()), "nothing is written into the working directory"


@pytest.mark.parametrize(("make", "sites", "inputs"), FILES.values(), ids=FILES)
def test_heads_are_pruned_in_place(make: Any, sites: int, inputs: Any, tmp_path: Path) -> None:
    file, out = make(tmp_path / "m.onnx"), tmp_path / "fast.onnx"
    fast = attnopt.optimize(file, PruneHeads(heads=(1, 2)), inputs(2, 7))
    fast.export_onnx(out)
    assert_kept(file, out)
    assert out.stat().st_size < file.stat().st_size
    zeroed = onnx.load(file)
    for stored in zeroed.graph.initializer:
        if stored.name.endswith("/o.weight"):
            array = numpy_helper.to_array(stored).copy()
            array[8:24] = 0
            stored.CopyFrom(numpy_helper.from_array(array, stored.name))
    onnx.save(zeroed, str(tmp_path / "zeroed.onnx"))
    for sizes in ((2, 7), (3, 12)):
        got, want = in_runtime(out, *inputs(*sizes)), in_runtime(tmp_path / "zeroed.onnx", *inputs(*sizes))
        oracle.assert_same(got[-1:], want[-1:])


def test_nothing_rewritten_is_the_same_file(tmp_path: Path) -> None:
    """A mask in an opset without a fused operator for it: there is no faster form."""
    file, out = plain(tmp_path / "m.onnx", masked=True), tmp_path / "fast.onnx"
    fast = attnopt.optimize(file, "fuse", (numbers(2, 7, DIM), numbers(2, 1, 1, 7)))
    fast.export_onnx(out)
    assert out.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 20, 23])
def test_every_opset(opset: int, tmp_path: Path) -> None:
    file, out = plain(tmp_path / "m.onnx", opset=opset, sizes=(2, 7)), tmp_path / "fast.onnx"
    x = numbers(2, 7, DIM)
    attnopt.optimize(file, "fuse", (x,)).export_onnx(out)
    assert_kept(file, out)
    assert "Softmax" not in [n.op_type for n in onnx.load(out).graph.node], "the old attention is gone"
    oracle.assert_same(in_runtime(out, x), in_runtime(file, x))
    fast = attnopt.optimize(file, PruneHeads(heads=(0,)), (x,))
    fast.export_onnx(out)
    oracle.assert_same(in_runtime(out, x), list(fast(x).values()))


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 23])
def test_windows_in_every_opset(opset: int, tmp_path: Path) -> None:
    """At lengths longer than the example's, and with fewer queries than the window is wide."""
    file, out = (
        plain(tmp_path / "m.onnx", opset=opset, sizes=(2, 9) if opset < 11 else ("b", "t")),
        tmp_path / "fast.onnx",
    )
    fast = attnopt.optimize(file, LocalWindow(2, 1), (numbers(2, 9, DIM),))
    fast.export_onnx(out)
    for sizes in ((2, 9),) if opset < 11 else ((2, 9), (1, 2), (3, 70)):
        x = numbers(*sizes, DIM)
        oracle.assert_same(in_runtime(out, x), list(fast(x).values()))


def test_axes_that_are_fixed_by_the_caller_are_said_to_be(tmp_path: Path) -> None:
    file, out = plain(tmp_path / "m.onnx"), tmp_path / "fast.onnx"
    fast = attnopt.optimize(file, PruneHeads(heads=(0,)), (numbers(2, 7, DIM),), dynamic_shapes={})
    with pytest.warns(attnopt.AttnoptWarning, match="b of x = 2, t of x = 7"):
        fast.export_onnx(out)
    assert declared(onnx.load(out).graph.input) == [("x", [2, 7, DIM])]


def test_weights_beside_the_file(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    model = onnx.load(plain(tmp_path / "m.onnx"))
    onnx.save(model, str(there / "m.onnx"), save_as_external_data=True, location="m.bin", size_threshold=1024)
    x = numbers(2, 7, DIM)
    attnopt.optimize(there / "m.onnx", PruneHeads(heads=(3,)), (x,)).export_onnx(here / "fast.onnx")
    assert len(list(here.iterdir())) == 2
    fast = attnopt.optimize(there / "m.onnx", PruneHeads(heads=(3,)), (x,))
    oracle.assert_same(in_runtime(here / "fast.onnx", x), list(fast(x).values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        attnopt.optimize(there / "m.onnx", "fuse", (x,), limit=0).export_onnx(here / "same.onnx")
    assert (here / "same.onnx").read_bytes() == (there / "m.onnx").read_bytes()
    oracle.assert_same(in_runtime(here / "same.onnx", x), in_runtime(there / "m.onnx", x))


# ---------------------------------------------------------------- reading
def test_sizes_that_depend_on_values_are_never_taken_for_fixed(tmp_path: Path) -> None:
    """An attention over the tokens that are kept: it has no size that could be known, and is left alone."""
    p = Parts()
    kept = p.node("Compress", ["x", "keep"], "kept", axis=1)
    out = p.attention("a", kept)
    file = p.save(
        tmp_path / "m.onnx",
        {"x": ["b", "t", DIM], "keep": ["t"]},
        {out: ["b", None, DIM]},
        types={"keep": TensorProto.BOOL},
    )
    x, keep = numbers(2, 7, DIM), torch.tensor([True, False, True, True, True, False, True])
    module = opened(file, (x, keep), {})
    other = torch.tensor([True, False, False, False, True, False, True])
    oracle.assert_same(list(module(x, other).values()), in_runtime(file, x, other))
    assert attnopt.inspect(file, (x, keep)).sites == ()


def test_an_operator_that_torch_computes_otherwise_is_left_to_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Parts()
    p.node("Neg", [p.node("Erf", [p.node("Abs", ["x"], "a")], "e")], "y")
    file = p.save(tmp_path / "m.onnx", {"x": [2, 3]}, {"y": [2, 3]})
    monkeypatch.setitem(operators.OPERATORS, "Erf", lambda _, x: x * 0.5)
    x = numbers(2, 3)
    oracle.assert_same(list(opened(file, (x,), {})(x).values()), in_runtime(file, x))


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_a_softmax_means_what_its_opset_says(kind: str, opset: int, tmp_path: Path) -> None:
    """Before opset 13 it runs over all axes from the given one on."""
    for options in ({}, {"axis": 1}, {"axis": 2}):
        p = Parts()
        p.node(kind, ["x"], "y", **options)
        file = p.save(tmp_path / "m.onnx", {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, opset=opset, ir=6)
        module = opened(file, (numbers(2, 3, 4),), {})
        assert not any("nodes" in name for name, _ in module.named_modules()), "it is read"
        x = numbers(2, 3, 4, seed=1)
        oracle.assert_same(list(module(x).values()), in_runtime(file, x))


def test_nodes_in_any_order(tmp_path: Path) -> None:
    """As onnxruntime's converter to float16 leaves them."""
    model = onnx.load(plain(tmp_path / "m.onnx"))
    nodes = [n.__deepcopy__() for n in reversed(model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(tmp_path / "turned.onnx"))
    fast = attnopt.optimize(tmp_path / "turned.onnx", "fuse", (numbers(2, 7, DIM),))
    fast.export_onnx(tmp_path / "fast.onnx")
    x = numbers(3, 12, DIM)
    oracle.assert_same(in_runtime(tmp_path / "fast.onnx", x), in_runtime(tmp_path / "m.onnx", x))


# ---------------------------------------------------------------- packed weights
PACKINGS = [
    "cast per tensor",
    "cast by column",
    "dequantized per tensor",
    "dequantized by column",
    "dequantized by row",
]


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_weights_are_cut_as_they_are(packing: str, tmp_path: Path) -> None:
    file, out = plain(tmp_path / "m.onnx", opset=17, packing=packing), tmp_path / "fast.onnx"
    x = numbers(2, 7, DIM)
    fast = attnopt.optimize(file, PruneHeads(heads=(1,)), (x,))
    assert fast.sites[0].num_heads == 3
    fast.export_onnx(out)
    assert_kept(file, out)
    assert out.stat().st_size < file.stat().st_size
    stored = {t.name: t for t in onnx.load(out).graph.initializer}
    assert not [n for n, t in stored.items() if t.data_type == TensorProto.FLOAT and np.prod(t.dims) >= DIM * DIM // 2]
    oracle.assert_same(in_runtime(out, x), list(fast(x).values()))
    x = numbers(1, 30, DIM)
    oracle.assert_same(in_runtime(out, x), list(fast(x).values()))


def test_a_file_rewritten_twice(tmp_path: Path) -> None:
    """The same constants get other names the second time; a window's loop is no attention any more."""
    p = Parts()
    p.node("Identity", [p.attention("b", p.attention("a", "x"))], "y")
    files = [tmp_path / f"{n}.onnx" for n in range(4)]
    p.save(files[0], {"x": ["b", "n", DIM]}, {"y": ["b", "n", DIM]}, opset=17)
    x = numbers(2, 9, DIM)
    whole = attnopt.optimize(files[0], LocalWindow(2), (x,))
    for before, after in itertools.pairwise(files[:3]):
        fast = attnopt.optimize(before, LocalWindow(2), (x,), limit=1)
        assert [s.status for s in fast.report.sites].count("rewritten") == 1
        fast.export_onnx(after)
    x = numbers(1, 40, DIM)
    oracle.assert_same(in_runtime(files[2], x), list(whole(x).values()))
    with pytest.warns(attnopt.AttnoptWarning, match="no attention was found .* inside a branch or loop"):
        attnopt.optimize(files[2], LocalWindow(1), (x,)).export_onnx(files[3])
    assert files[3].read_bytes() == files[2].read_bytes()


def test_what_the_file_computes_twice(tmp_path: Path) -> None:
    """Torch computes it once; both are kept as they are."""
    p = Parts()
    x = p.attention("a", "x")
    near, far = (p.node("Sub", [x, p.node("ReduceMean", [x], f"mean {n}", axes=[-1])], f"apart {n}") for n in range(2))
    wide = p.node("ReduceMean", [p.node("Mul", [near, near], "square")], "variance", axes=[-1])
    p.node("Div", [far, p.node("Sqrt", [wide], "deviation")], "y")
    file = p.save(tmp_path / "m.onnx", {"x": ["b", "n", DIM]}, {"y": ["b", "n", DIM]})
    fast = attnopt.optimize(file, LocalWindow(2), (numbers(2, 9, DIM),))
    fast.export_onnx(tmp_path / "fast.onnx")
    assert_kept(file, tmp_path / "fast.onnx")
    x = numbers(3, 30, DIM)
    oracle.assert_same(in_runtime(tmp_path / "fast.onnx", x), list(fast(x).values()))


class Merged(nn.Module):
    """Heads on one axis with the batch, and what is added to the scores, too (DeBERTa, arXiv:2006.03654)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.places = nn.Parameter(torch.randn(64, DIM // 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (f(x).view(B, L, 4, -1).transpose(1, 2).reshape(B * 4, L, -1) for f in (self.q, self.k, self.v))
        order = torch.arange(L)
        apart = (order[:, None] - order).clamp(-31, 31) + 31
        bias = torch.gather(q @ self.places.T, -1, apart.expand(B * 4, L, L))
        weights = (torch.bmm(q, k.transpose(1, 2)) + bias).view(B, 4, L, L).softmax(-1)
        made = torch.bmm(weights.view(B * 4, L, L), v).view(B, 4, L, -1)
        return self.o(made.transpose(1, 2).reshape(B, L, DIM))


def test_what_holds_for_two_texts_holds_for_one(tmp_path: Path) -> None:
    """An axis of four heads times the batch has at least eight elements only where the batch has two."""
    torch.manual_seed(0)
    model, x, file, out = Merged().eval(), numbers(2, 9, DIM), tmp_path / "m.onnx", tmp_path / "fast.onnx"
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        model,
        (x,),
        str(file),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=(free,),
        verbose=False,
        external_data=False,
    )
    policy = PruneHeads(heads=(1,))
    attnopt.optimize(file, policy, (x,)).export_onnx(out)
    want = attnopt.optimize(model, policy, (x,), dynamic_shapes="auto")
    for batch, length in ((2, 9), (1, 9), (3, 20), (1, 31)):
        x = numbers(batch, length, DIM)
        oracle.assert_same(in_runtime(out, x), [want(x)])


def test_axes_of_one_name_are_compared_at_one_size(tmp_path: Path) -> None:
    """This mask may have more rows than there are texts; ONNX Runtime takes the same memory for what has the same name."""
    p = Parts()
    number = p.node("Cast", ["ids"], "number", to=TensorProto.FLOAT)
    table = p.weight("table", 50, DIM)
    x = p.node("Gather", [table, p.node("Cast", [p.node("Abs", [number], "n")], "back", to=TensorProto.INT64)], "x")
    shown = p.node("Sub", [p.node("Cast", ["mask"], "m", to=TensorProto.FLOAT), p.constant("one", np.float32(1))], "m1")
    hidden = p.node("Mul", [shown, p.constant("large", np.float32(1e4))], "hidden")
    rows = p.node("Gather", [p.node("Shape", ["ids"], "sizes"), p.constant("first", np.int64(0))], "rows")
    order = p.node("Range", [p.constant("zero", np.int64(0)), rows, p.constant("step", np.int64(1))], "order")
    bias = p.node("Gather", [hidden, order], "own", axis=0)
    bias = p.node("Unsqueeze", [bias, p.constant("axes", np.asarray([1, 2]))], "bias")
    p.node("Identity", [p.attention("a", x, bias)], "y")
    sizes, types = ["b", "n"], dict.fromkeys(("ids", "mask"), TensorProto.INT64)
    file = p.save(tmp_path / "m.onnx", {"ids": sizes, "mask": sizes}, {"y": [*sizes, DIM]}, types=types, opset=17)
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    fast = attnopt.optimize(file, LocalWindow(2), (ids, mask))
    fast.export_onnx(tmp_path / "fast.onnx")
    fast.export_onnx(tmp_path / "int8.onnx", quantize="int8")
    ids, mask = ids.repeat(2, 5), mask.repeat(2, 5)
    oracle.assert_same(in_runtime(tmp_path / "fast.onnx", ids, mask), list(fast(ids, mask).values()))


# ---------------------------------------------------------------- onnxruntime's quantizer
def test_attentions_between_dynamically_quantized_projections(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    file, out = tmp_path / "int8.onnx", tmp_path / "fast.onnx"
    quantize_dynamic(plain(tmp_path / "m.onnx", opset=17), file)
    x = numbers(2, 9, DIM)
    fast = attnopt.optimize(file, LocalWindow(2), (x,))
    assert [s.status for s in fast.report.sites] == ["rewritten"]
    fast.export_onnx(out)
    kinds = [[n.op_type for n in onnx.load(f).graph.node] for f in (file, out)]
    assert [k.count("MatMulInteger") for k in kinds] == [4, 4]
    for sizes in ((2, 9), (1, 40)):
        x = numbers(*sizes, DIM)
        oracle.assert_same(in_runtime(out, x), list(fast(x).values()))


@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
def test_quantized_scores_are_a_near_miss(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        left = 2

        def get_next(self) -> Any:
            self.left -= 1
            return {"x": numbers(2, 9, DIM, seed=self.left).numpy()} if self.left >= 0 else None

    file, out = tmp_path / "int8.onnx", tmp_path / "fast.onnx"
    quantize_static(plain(tmp_path / "m.onnx", opset=17), file, Batches())
    fast = attnopt.optimize(file, LocalWindow(2), (numbers(2, 9, DIM),))
    assert {m.refusal.code for m in fast.report.near_misses} == {"opaque-operator"}
    fast.export_onnx(out)
    assert out.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("opset", "options"), [(17, {}), (23, {"op_types_to_quantize": ["MatMul", "Gemm"]})])
def test_what_is_written_can_be_quantized(opset: int, options: Any, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    file, out = plain(tmp_path / "m.onnx", opset=opset), tmp_path / "fast.onnx"
    x = numbers(2, 9, DIM)
    attnopt.optimize(file, PruneHeads(heads=(1,)), (x,)).export_onnx(out)
    quantize_dynamic(out, tmp_path / "int8.onnx", **options)
    (got,), (want,) = in_runtime(tmp_path / "int8.onnx", x), in_runtime(out, x)
    assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.99


def test_a_module_with_nodes_of_onnx_runtime_is_not_saved(tmp_path: Path) -> None:
    file = contrib(tmp_path / "m.onnx")
    fast = attnopt.optimize(file, "fuse", (numbers(2, 7, DIM),))
    with pytest.raises(attnopt.ArchiveError, match="some of its nodes run in ONNX Runtime"):
        fast.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
