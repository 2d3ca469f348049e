"""ONNX files as input: those of older exporters, broken ones and hostile ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import oracle
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import attnopt
from attnopt.onnx.load.load import opened
from attnopt.passes import LocalWindow, PruneHeads

SHAPES = {"ids": {0: "batch", 1: "length"}, "padding": {0: "batch", 1: "length"}}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (f(x).view(B, L, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / 8**0.5 + mask).softmax(-1)
        x = self.norm(x + self.o((weights @ v).transpose(1, 2).reshape(B, L, 32)))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Layer() for _ in "ab")

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        mask = (1.0 - padding[:, None, None, :].float()) * -1e9
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def inputs(batch: int = 2, length: int = 10) -> dict[str, Tensor]:
    padding = torch.ones(batch, length, dtype=torch.long)
    padding[0, -2:] = 0
    return {"ids": torch.randint(0, 50, (batch, length)), "padding": padding}


def written(path: Path, is_new: bool = False, opset: int = 14) -> Path:
    """By torch's present exporter or by the one before it."""
    x = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"dynamic_shapes": {n: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for n in x}} if is_new else {}
        older = {} if is_new else {"dynamic_axes": SHAPES, "input_names": list(x), "output_names": ["hidden"]}
        model = encoder()
        torch.onnx.export(
            model, tuple(x.values()), str(path), dynamo=is_new, opset_version=opset, verbose=False, **axes, **older
        )
    return path


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("onnx") / "old.onnx")


def in_runtime(path: Path, x: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in x.items()})[0])


@pytest.mark.parametrize("is_new", [False, True], ids=["TorchScript exporter", "dynamo exporter"])
def test_a_file_becomes_a_faster_file(is_new: bool, tmp_path: Path) -> None:
    """The same sites and weights as in the model that it was made of, and the same numbers at another size."""
    file, out = written(tmp_path / "m.onnx", is_new, 18 if is_new else 14), tmp_path / "fast.onnx"
    found = attnopt.inspect(file, (), inputs())
    assert [s.name for s in found.sites] == ["layers.0", "layers.1"]
    assert [s.num_heads for s in found.sites] == [4, 4]
    attnopt.optimize(file, "fuse", (), inputs()).export_onnx(out)
    assert out.read_bytes() == file.read_bytes(), "under a mask these opsets have no faster form"
    fast = attnopt.optimize(file, {"layers.0": LocalWindow(2), "layers.1": PruneHeads(heads=(1,))}, (), inputs())
    fast.export_onnx(out)
    x = inputs(3, 17)
    oracle.assert_same([in_runtime(out, x)], list(fast(**x).values()))
    made, before = onnx.load(out).graph, onnx.load(file).graph
    assert [i.name for i in made.input] == ["ids", "padding"]
    assert list(made.input) == list(before.input)
    assert list(made.output) == list(before.output)


def test_passes_mean_the_same_as_on_the_model(old: Path) -> None:
    model, x = encoder(), inputs()
    policy = {"layers.0": LocalWindow(2), "layers.1": PruneHeads(heads=(1, 3))}
    want = attnopt.optimize(model, policy, (), x)(**x)
    fast = attnopt.optimize(str(old), policy, tuple(x.values()))
    oracle.assert_same([fast(**x)["hidden"]], [want])
    assert fast.sites[1].num_heads == 2


# ---------------------------------------------------------------- single operators
def graph(nodes: list[Any], given: dict[str, list[Any]], constants: dict[str, Any], opset: int = 17) -> Any:
    sizes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given.items()]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "g", sizes, out, stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


f32 = np.float32
CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "integers are divided towards zero": (["Cast:to=7", "Div:c", "Cast:to=1"], {"c": np.array([3, -2, 5, 7])}),
    "the sign of a remainder": (["Mod:c,fmod=1"], {"c": np.array([2, -2, 0.3, 1], f32)}),
    "the sign of a whole remainder": (["Cast:to=7", "Mod:c", "Cast:to=1"], {"c": np.array([2, -2, 3, 1])}),
    "a constant of another rank": (["Add:c"], {"c": np.ones((1, 1, 1, 1), f32)}),
    "gather of negative places": (["Gather:c,axis=2"], {"c": np.array([-1, 0, 2])}),
    "gather of one place": (["Gather:c,axis=1"], {"c": np.array(-1)}),
    "slice to the end": (["Slice:s,e,a,t"], {"s": [1], "e": [2**63 - 1], "a": [-1], "t": [2]}),
    "expand both ways": (["Expand:c"], {"c": np.array([2, 1, 1, 4])}),
    "reduce without axes": (["ReduceMean:keepdims=0"], {}),
    "reduce without attributes": (["ReduceMean:"], {}),
    "sum over axes without attributes": (["ReduceSum:c"], {"c": np.array([1])}),
    "reduce over axes": (["ReduceSum:c,keepdims=0"], {"c": np.array([0, -1])}),
    "reshape keeps and fills": (["Reshape:c"], {"c": np.array([0, -1])}),
    "split without an axis": (["Split:c"], {"c": np.array([1, 1])}),
    "split in unequal parts": (["Split:c,axis=2"], {"c": np.array([1, 3])}),
    "clip from below": (["Clip:c"], {"c": np.array(0.1, f32)}),
    "softmax over tokens": (["Softmax:axis=1"], {}),
    "softmax without an axis": (["Softmax:"], {}),
    "power": (["Pow:c"], {"c": np.array(2.0, f32)}),
    "the lower triangle": (["Trilu:upper=0"], {}),
    "the upper triangle": (["Trilu:"], {}),
    "normalized over features": (
        ["Mul:s", "LayerNormalization:w"],
        {"s": np.array(1e-2, f32), "w": np.arange(4, dtype=f32)},
    ),
    "normalized over all but the batch": (
        ["LayerNormalization:w,b,axis=1"],
        {"w": np.ones((3, 4), f32), "b": np.ones((3, 4), f32)},
    ),
    "gather without an axis": (["Gather:c"], {"c": np.array([1, 0])}),
    "gather elements without an axis": (["GatherElements:c"], {"c": np.array([[[1, 0, 1, 0]]])}),
    "transposed without axes": (["Transpose:"], {}),
    "flattened": (["Flatten:axis=2"], {}),
    "flattened without an axis": (["Flatten:"], {}),
    "tiled": (["Tile:c"], {"c": np.array([1, 2, 1])}),
    "gemm with all options": (
        ["Reshape:s", "Gemm:w,b,alpha=0.5,beta=2.0,transB=1"],
        {"s": [-1, 4], "w": np.arange(12, dtype=f32).reshape(3, 4), "b": np.arange(3, dtype=f32)},
    ),
    "gemm without options": (["Reshape:s", "Gemm:w"], {"s": [-1, 4], "w": np.arange(12, dtype=f32).reshape(4, 3)}),
    "a convolution without attributes": (["Conv:w"], {"w": np.arange(18, dtype=f32).reshape(2, 3, 3)}),
    "a convolution with uneven padding": (
        ["Conv:w,pads=[2;0],strides=[2]"],
        {"w": np.arange(18, dtype=f32).reshape(2, 3, 3)},
    ),
}


def chain(steps: list[str]) -> list[Any]:
    """``Kind:inputs,attributes``, each on what the one before it gave."""
    nodes, last = [], "x"
    for i, step in enumerate(steps):
        kind, _, rest = step.partition(":")
        parts = [p for p in rest.split(",") if p]
        options = {k: eval(v.replace(";", ",")) for k, _, v in (p.partition("=") for p in parts if "=" in p)}
        out = "y" if i == len(steps) - 1 else f"h{i}"
        outputs = [out, "other"] if kind == "Split" else [out]
        nodes.append(helper.make_node(kind, [last, *(p for p in parts if "=" not in p)], outputs, f"n{i}", **options))
        last = out
    return nodes


@pytest.mark.parametrize(("steps", "constants"), CASES.values(), ids=CASES)
def test_an_operator_is_what_onnx_runtime_makes_of_it(steps: list[str], constants: Any, tmp_path: Path) -> None:
    """What gives other numbers is left to ONNX Runtime; here everything has to be read."""
    values = {
        n: np.asarray(v) if np.asarray(v).dtype != np.int32 else np.asarray(v, np.int64) for n, v in constants.items()
    }
    onnx.save(graph(chain(steps), {"x": [2, 3, 4]}, values), str(tmp_path / "m.onnx"))
    torch.manual_seed(0)
    module = opened(tmp_path / "m.onnx", (3 * torch.randn(2, 3, 4),), {})
    assert not [name for name, _ in module.named_modules() if "nodes" in name]


def test_constants_are_divided_towards_zero(tmp_path: Path) -> None:
    nodes = [helper.make_node("Div", ["a", "b"], ["c"]), helper.make_node("Cast", ["c"], ["d"], to=1)]
    constants = {"a": np.array([-7, 7, 7, -8]), "b": np.array([2, -2, 2, 4])}
    nodes.append(helper.make_node("Add", ["x", "d"], ["y"]))
    onnx.save(graph(nodes, {"x": [2, 3, 4]}, constants), str(tmp_path / "m.onnx"))
    module = opened(tmp_path / "m.onnx", (torch.zeros(2, 3, 4),), {})
    assert module(torch.zeros(1, 1, 4))["y"].flatten().tolist() == [-3, -3, 3, -2]


# ---------------------------------------------------------------- refusals
def refused(path: Path, said: str, *args: Any) -> None:
    with pytest.raises(attnopt.CaptureError, match=said) as caught:
        attnopt.optimize(path, "fuse", args or (torch.ones(2, 3, 4),))
    assert str(path) in str(caught.value)


def test_what_onnx_runtime_cannot_run(tmp_path: Path) -> None:
    model = graph(chain(["Neg:"]), {"x": [2, 3, 4]}, {})
    model.graph.node.append(helper.make_node("Unheard", ["x"], ["z"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(tmp_path / "m.onnx"))
    refused(tmp_path / "m.onnx", "cannot be run on these inputs.*Unheard")


def test_a_file_in_onnx_runtimes_own_format(tmp_path: Path) -> None:
    (tmp_path / "m.ort").write_bytes(b"\x10\x00\x00\x00ORTM" + bytes(100))
    refused(tmp_path / "m.ort", "in ONNX Runtime's own format")


def test_inputs_are_asked_for(old: Path) -> None:
    with pytest.raises(attnopt.CaptureError, match="takes ids, padding"):
        attnopt.optimize(old, "fuse")


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x08\x09" * 40, None], ids=["empty", "text", "bytes", "missing"]
)
def test_what_is_no_model(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "cannot be read as an ONNX model")


def test_a_truncated_model(old: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(old.read_bytes()[:-500])
    refused(tmp_path / "m.onnx", "cannot be read as an ONNX model")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"location": "../secret.bin"}, "which is no file in its folder"),
        ({"location": "/etc/passwd"}, "which is no file in its folder"),
        ({"location": "link.bin"}, "which is no file in its folder"),
        ({"location": "gone.bin"}, "which is no file in its folder"),
        ({"location": "short.bin", "offset": "8"}, "ends before the weights"),
        ({"location": "short.bin", "offset": "-8"}, "ends before the weights"),
    ],
    ids=["above", "absolute", "link", "missing", "short", "negative"],
)
def test_weights_lie_beside_the_model(place: dict[str, str], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (folder / "short.bin").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = graph(chain(["Add:w"]), {"x": [2, 3, 4]}, {})
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in ({"length": "16"} | place).items():
        weights.external_data.add(key=key, value=value)
    model.graph.initializer.append(weights)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(attnopt.CaptureError, match=said):
        attnopt.optimize(folder / "m.onnx", "fuse", (torch.ones(2, 3, 4),))
