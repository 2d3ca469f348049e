"""ONNX files as input: those of older exporters, broken ones and hostile ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import oracle
import pytest
import torch
from older_onnx import CASES, NEWER, chain, encoder, graph, inputs, written
from onnx import TensorProto, helper
from torch import Tensor, nn

import attnopt
from attnopt.onnx.load.load import opened
from attnopt.passes import LocalWindow, PruneHeads


def in_runtime(path: Path, x: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in x.items()})[0])


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("steps", "constants", "opset"),
    [(*case, 17) for case in CASES.values()] + [(*case, 23) for case in NEWER.values()],
    ids=[*CASES, *NEWER],
)
def test_an_operator_is_what_onnx_runtime_makes_of_it(
    steps: list[str], constants: Any, opset: int, tmp_path: Path
) -> None:
    """What gives other numbers is left to ONNX Runtime; here everything has to be read."""
    values = {
        n: np.asarray(v) if np.asarray(v).dtype != np.int32 else np.asarray(v, np.int64) for n, v in constants.items()
    }
    onnx.save(graph(chain(steps), {"x": [2, 3, 4]}, values, opset), str(tmp_path / "m.onnx"))
    torch.manual_seed(0)
    module = opened(tmp_path / "m.onnx", (3 * torch.randn(2, 3, 4),), {})
    assert not [name for name, _ in module.named_modules() if "nodes" in name]


def test_sizes_are_computed(tmp_path: Path) -> None:
    """What stands in the way of a reshape is known while the file is read."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("ReduceProd", ["sizes"], ["all"], keepdims=1),
        helper.make_node("Neg", ["all"], ["less"]),
        helper.make_node("Mod", ["less", "number"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    file = tmp_path / "m.onnx"
    onnx.save(graph(nodes, {"x": [2, 3, 4]}, {"number": np.array([32]), "rest": np.array([-1])}), str(file))
    x = torch.randn(2, 3, 4)
    module = opened(file, (x,), {})
    assert not [name for name, _ in module.named_modules() if "nodes" in name]
    (y,) = module(x).values()
    assert y.shape == (8, 3)  # -24 modulo 32


class Shifted(nn.Module):
    """Scores of relative positions, padded and shifted (Music Transformer, arXiv:1809.04281), by an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.places = nn.Parameter(torch.randn(64, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (f(x).view(B, L, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        shifted = nn.functional.pad(torch.einsum("bhld,rd->bhlr", q, self.places[:L]), (1, 0))
        scores = q @ k.transpose(-1, -2) + shifted.reshape(B, 4, L + 1, L)[:, :, 1:].tril()
        return self.o(((scores / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(B, L, 32))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", [LocalWindow(2), PruneHeads(heads=(1,))], ids=["window", "fewer heads"])
def test_scores_that_are_padded_and_shifted(policy: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, file = Shifted().eval(), torch.randn(2, 12, 32), tmp_path / "m.onnx"
    axes = {"x": {0: "batch", 1: "length"}}
    torch.onnx.export(model, (x,), str(file), dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
    assert not [name for name, _ in opened(file, (x,), {}).named_modules() if "nodes" in name]
    fast = attnopt.optimize(file, policy, (x,))
    assert [s.status for s in fast.report.sites] == ["rewritten"]
    for batch, length in ((2, 12), (3, 31)):
        x = torch.randn(batch, length, 32)
        oracle.assert_same(list(fast(x).values()), [attnopt.optimize(model, policy, (x,))(x)])


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


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09" * 40], ids=["empty", "text", "bytes"])
def test_what_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "is not a readable ONNX model")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "m.onnx", "there is no file")


def test_a_truncated_model(old: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(old.read_bytes()[:-500])
    refused(tmp_path / "m.onnx", "is not a readable ONNX model")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"location": "../secret.bin"}, "which is not a file in its folder"),
        ({"location": "/etc/passwd"}, "which is not a file in its folder"),
        ({"location": "link.bin"}, "which is not a file in its folder"),
        ({"location": "gone.bin"}, "which is not a file in its folder"),
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
