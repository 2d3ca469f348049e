"""Hostile and huge ONNX files: nothing outside of their folder is read, memory stays bounded, and the process goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from older_onnx import chain, graph
from onnx import TensorProto, helper, numpy_helper

import attnopt
from attnopt.onnx.load.load import opened

f32 = np.float32


# ---------------------------------------------------------------- nothing outside of the folder, however it is asked for
def outside(name: str) -> TensorProto:
    weights = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="../secret.bin")
    weights.external_data.add(key="length", value="16")
    return weights


def in_a_node(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=outside("c")))


def in_a_branch(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([], "b", [], [], [outside("c")])
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch))


def in_a_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=outside("c"))
    model.functions.append(helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.insert(0, helper.make_node("F", [], ["c"], domain="own"))


def in_sparse_weights(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside("c"))
    sparse.dims.append(4)


def in_training(model: onnx.ModelProto) -> None:
    model.training_info.add().initialization.initializer.append(outside("c"))


@pytest.mark.parametrize("place", [in_a_node, in_a_branch, in_a_function, in_sparse_weights, in_training])
def test_weights_from_elsewhere(place: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(np.arange(4, dtype=f32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    model = graph(chain(["Neg:"]), {"x": [2, 3, 4]}, {})
    place(model)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        attnopt.CaptureError, match=r"refers to the weights 'c' in '\.\./secret\.bin', which is not a file"
    ):
        opened(folder / "m.onnx", (torch.ones(2, 3, 4),), {})


def test_a_folder_that_is_a_link_to_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (folder / "here").symlink_to(tmp_path)
    model = graph(chain(["Add:w"]), {"x": [2, 3, 4]}, {})
    weights = outside("w")
    weights.external_data[0].value = "here/secret.bin"
    model.graph.initializer.append(weights)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(attnopt.CaptureError, match="which is not a file in its folder"):
        opened(folder / "m.onnx", (torch.ones(2, 3, 4),), {})


def test_weights_that_are_in_two_places(tmp_path: Path) -> None:
    model = graph(chain(["Add:w"]), {"x": [2, 3, 4]}, {"w": np.zeros(4, f32)})
    model.graph.initializer[0].CopyFrom(outside("w"))
    model.graph.initializer[0].external_data.add(key="location", value="m.onnx")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(attnopt.CaptureError, match="gives two locations for the weights 'w'"):
        opened(tmp_path / "m.onnx", (torch.ones(2, 3, 4),), {})


# ---------------------------------------------------------------- bombs
MEMORY = 8 << 30  # bytes of address space; torch and ONNX Runtime take most of them

RUN = """
    import resource, sys
    import onnx, onnxruntime, torch, attnopt, attnopt.onnx.load.load
    resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
    for what in sys.argv[1:]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            attnopt.inspect(what, (torch.ones(2, 3, 4),))
        except attnopt.CaptureError as error:
            said = str(error).splitlines()[0]
        else:
            said = "fine"
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, said, flush=True)
"""


def stored(file: Path, model: onnx.ModelProto) -> None:
    file.write_bytes(model.SerializeToString())


def with_weights(file: Path, weights: TensorProto) -> None:
    model = graph(chain(["Add:w"]), {"x": [2, 3, 4]}, {"w": np.zeros(4, f32)})
    model.graph.initializer[0].CopyFrom(weights)
    stored(file, model)


def huge_sizes(file: Path) -> None:
    with_weights(file, TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40, 4], raw_data=bytes(16)))


def huge_hole(file: Path) -> None:
    with (file.parent / "hole.bin").open("wb") as hole:
        hole.truncate(1 << 40)
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 38], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="hole.bin")
    with_weights(file, weights)


def one_file_many_times(file: Path) -> None:
    with (file.parent / "weights.bin").open("wb") as hole:
        hole.truncate(1 << 26)
    model = graph(chain(["Neg:"]), {"x": [2, 3, 4]}, {})
    for n in range(1000):
        weights = TensorProto(
            name=f"w{n}", data_type=TensorProto.FLOAT, dims=[1 << 24], data_location=TensorProto.EXTERNAL
        )
        weights.external_data.add(key="location", value="weights.bin")
        model.graph.initializer.append(weights)
    stored(file, model)


def huge_file(file: Path) -> None:
    with file.open("wb") as hole:
        hole.truncate(1 << 40)


def a_pipe(file: Path) -> None:
    os.mkfifo(file)


def a_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def filled(file: Path, kind: int, size: int) -> None:
    value = numpy_helper.from_array(np.zeros(1, helper.tensor_dtype_to_np_dtype(kind)))
    fill = helper.make_node("ConstantOfShape", ["n"], ["c"], value=value)
    model = graph([fill, *chain(["Neg:"])], {"x": [2, 3, 4]}, {"n": np.array([size])})
    stored(file, model)


def huge_numbers(file: Path) -> None:
    filled(file, TensorProto.INT64, 1 << 40)


def huge_constant(file: Path) -> None:
    filled(file, TensorProto.FLOAT, 1 << 40)


def huge_range(file: Path) -> None:
    nodes = [helper.make_node("Range", ["a", "b", "c"], ["r"]), *chain(["Neg:"])]
    numbers = {"a": np.array(0), "b": np.array(1 << 62), "c": np.array(1)}
    stored(file, graph(nodes, {"x": [2, 3, 4]}, numbers))


def least_by_minus_one(kind: str) -> Callable[[Path], None]:
    """On x86 this division ends the process."""

    def make(file: Path) -> None:
        nodes = [helper.make_node(kind, ["a", "b"], ["c"]), *chain(["Neg:"])]
        stored(file, graph(nodes, {"x": [2, 3, 4]}, {"a": np.array([-(1 << 63)] * 99), "b": np.array(-1)}))

    make.__name__ = f"least_{kind}"
    return make


BOMBS = [
    huge_sizes, huge_hole, one_file_many_times, huge_file, a_pipe, a_device, huge_numbers, huge_constant, huge_range,
    least_by_minus_one("Div"), least_by_minus_one("Mod"),
]  # fmt: skip


@pytest.mark.subprocess
def test_bombs(tmp_path: Path) -> None:
    """Read one after the other in a process of limited memory: each is refused by name, costs little and ends nothing."""
    files = []
    for bomb in BOMBS:
        folder = tmp_path / bomb.__name__
        folder.mkdir()
        files.append(folder / "m.onnx")
        bomb(files[-1])
    source = textwrap.dedent(RUN).format(memory=MEMORY)
    done = subprocess.run([sys.executable, "-c", source, *map(str, files)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for file, line in zip(files, done.stdout.splitlines(), strict=True):
        used, said = line.split(" ", 1)
        assert int(used) < 300, line
        assert str(file) in said, line
