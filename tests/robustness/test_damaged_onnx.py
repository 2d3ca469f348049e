"""Damaged ONNX files: refused by name, or taken for what they say; and names that Python would not take."""

from __future__ import annotations

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
from older_onnx import CASES, chain, graph, inputs
from onnx import TensorProto, helper

import attnopt
from attnopt.onnx.load.load import opened

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
def test_damaged_bytes(old: Path, tmp_path: Path, flips: list[tuple[float, int]], kept: float) -> None:
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
def test_something_in_it_changed(old: Path, tmp_path: Path, case: str | None, data: Any, count: int) -> None:
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
        ([("Add", ["x", "b"], "a"), ("Neg", ["a"], "b"), ("Neg", ["b"], "y")], "depend on each other"),
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
