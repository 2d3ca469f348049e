"""ONNX files from elsewhere: damaged, hostile or huge ones are refused by name; nothing beside their folder is read, and the
process goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_from_onnx import CASES, chain, graph, inputs, old  # noqa: F401  (``old`` is a fixture)

import attnopt
from attnopt.from_onnx.opening import opened

BOUNDED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
ODD_NAMES = ["", "a", "b.c", "forward", "class", "0", "x/y", "x_y", "\x1b[2J", "é", "x", "w" * 300, "a\0b", "x\n"]
ODD_NUMBERS = [-1, 0, 1, 2, 7, 11, 16, 22, 1 << 31, 1 << 40, 1 << 62, -(1 << 63), (1 << 63) - 1]
f32 = np.float32


def check(path: Path, x: dict[str, Any]) -> None:
    """The file is taken, or refused in words that a terminal can show and with its name."""
    try:
        opened(path, (), x)
    except attnopt.CaptureError as error:
        said = str(error)
        assert str(path) in said
        assert said.replace("\n", "").isprintable(), said


# ---------------------------------------------------------------- damage
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), max_size=3), kept=st.floats(0.9, 1.1))
@BOUNDED
def test_damaged_bytes(old: Path, tmp_path: Path, flips: list[tuple[float, int]], kept: float) -> None:  # noqa: F811
    data = bytearray(old.read_bytes())
    for place, bit in flips:
        data[int(place * (len(data) - 1))] ^= 1 << bit
    (tmp_path / "m.onnx").write_bytes(data[: int(kept * len(data))])
    check(tmp_path / "m.onnx", inputs())


Place = tuple[Message, Any, int | None]  # a message, its field, and which of several values


def places(model: Message) -> Iterator[Place]:
    """Everything that is set."""
    stack = [model]
    while stack:
        here = stack.pop()
        for field, value in here.ListFields():
            several = not isinstance(value, (Message, int, float, str, bytes))
            for n, one in enumerate(value if several else [value]):
                yield here, field, n if several else None
                if isinstance(one, Message):
                    stack.append(one)


def changed(place: Place, how: str, draw: Callable[[Any], Any]) -> None:
    here, field, n = place
    value = getattr(here, field.name)
    if how == "drop":
        here.ClearField(field.name) if n is None else value.__delitem__(n)
    elif how == "repeat" and n is not None:
        value.append(value[n]) if not isinstance(value[n], Message) else value.add().CopyFrom(value[n])
    elif field.message_type is None:
        held = value if n is None else value[n]
        kinds: dict[type, Any] = {
            str: ODD_NAMES,
            bytes: [b"", b"\xff\xfe", bytes(16)],
            float: [0.0, float("nan"), 1e38],
        }
        other = draw(st.sampled_from(kinds.get(type(held), ODD_NUMBERS)))
        try:
            setattr(here, field.name, other) if n is None else value.__setitem__(n, other)
        except ValueError:  # no number of this type
            here.ClearField(field.name)


@given(case=st.sampled_from([None, *CASES]), data=st.data(), count=st.integers(1, 3))
@BOUNDED
def test_something_in_it_changed(old: Path, tmp_path: Path, case: str | None, data: Any, count: int) -> None:  # noqa: F811
    if case is None:
        model, x = onnx.load(old), inputs()
    else:
        steps, constants = CASES[case]
        model, x = graph(chain(steps), {"x": [2, 3, 4]}, constants), {"x": torch.randn(2, 3, 4)}
    for _ in range(count):
        found = list(places(model))
        if found:
            how = data.draw(st.sampled_from(["change", "change", "drop", "repeat"]))
            changed(found[data.draw(st.integers(0, len(found) - 1))], how, data.draw)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    check(tmp_path / "m.onnx", x)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("Add", ["x", "b"], "a"), ("Neg", ["a"], "b"), ("Neg", ["b"], "y")], "topologically sorted"),
        ([("Add", ["x", "nowhere"], "y")], "topologically sorted"),
        ([("Neg", ["x"], "z")], "Graph output 'y' is not an output of any node"),
        ([("Neg", ["x"], "y"), ("Abs", ["x"], "y")], "single static assignment"),
        ([("\x1b[2J", ["x"], "y")], r"No Op registered for \\x1b\[2J"),
    ],
    ids=["cycle", "missing input", "missing output", "made twice", "control characters"],
)
def test_graphs_that_are_none(nodes: list[Any], said: str, tmp_path: Path) -> None:
    made = [helper.make_node(kind, given, [out]) for kind, given, out in nodes]
    model = graph(chain(["Neg:"]), {"x": [2, 3, 4]}, {})
    del model.graph.node[:]
    model.graph.node.extend(made)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(attnopt.CaptureError, match=said):
        opened(tmp_path / "m.onnx", (torch.ones(2, 3, 4),), {})


def test_names_that_are_no_names(tmp_path: Path) -> None:
    """Inputs, weights and outputs may be called anything, also the same in Python or as what a module has."""
    given = ["a/b", "a_b", "class", "0", "self"]
    weights = ["x/y", "x_y", "inputs", "training", "outputs", "a.b", "a", "_nodes"]
    values = {name: np.arange(4, dtype=f32) + n for n, name in enumerate(weights)}
    nodes, last = [], given[0]
    for n, name in enumerate([*given[1:], *weights]):
        nodes.append(helper.make_node("Mul" if n % 2 else "Sub", [last, name], [f"h{n}"]))
        last = f"h{n}"
    nodes += [
        helper.make_node("Neg", [last], ["y"]),
        helper.make_node("Abs", [last], ["y/"]),
        helper.make_node("Exp", ["0"], ["y_"]),
        helper.make_node("Exp", ["0"], ["12"]),
    ]
    model = graph(nodes, {name: [2, 4] for name in given}, values)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("y/", "y_", "12")
    )
    onnx.save(model, str(tmp_path / "m.onnx"))
    module = opened(tmp_path / "m.onnx", tuple(torch.randn(2, 4) for _ in given), {})
    assert list(module.signature.parameters) == ["a_b", "a_b_", "_class", "_0", "_self"]
    assert len(module.state_dict()) == len(weights)
    assert list(module(*torch.randn(5, 2, 4))) == ["y", "y_", "y__", "12"]


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
    with pytest.raises(attnopt.CaptureError, match=r"wants the weights 'c' from '\.\./secret\.bin', which is no file"):
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
    with pytest.raises(attnopt.CaptureError, match="which is no file in its folder"):
        opened(folder / "m.onnx", (torch.ones(2, 3, 4),), {})


# ---------------------------------------------------------------- bombs
MEMORY = 8 << 30  # bytes of address space; torch and ONNX Runtime take most of them

RUN = """
    import resource, sys
    import onnx, onnxruntime, torch, attnopt, attnopt.from_onnx.opening
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
