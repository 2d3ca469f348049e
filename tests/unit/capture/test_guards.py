"""A model that asks for its inputs' sizes: outside of what was answered at capture nothing may give numbers."""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from oracle import close
from torch import Tensor, nn

import attnopt
from attnopt.base.ort_session import cpu_session
from attnopt.capture.size_algebra import always_holds, told_once
from attnopt.errors import CaptureError, ExportError
from attnopt.onnx.export.size_checks import check_sizes

pytestmark = pytest.mark.usefixtures("one_torchlib")

STOPPED = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument


class Asking(nn.Module):
    """Doubled at even lengths, more at others beside."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        made: Tensor = self.attend(x, x, x, need_weights=False)[0]
        if x.shape[1] % 2 == 0:
            made = made * 2
        if (x.shape[1] + 3) // 4 == 7:
            made = made * 3
        if given["t"].shape[0] == 2 * x.shape[1]:
            made = made + given["t"].sum()
        return made


def inputs(length: int, more: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(2, length, 16), {"t": torch.randn(more)}


@pytest.fixture(scope="module")
def model() -> Asking:
    torch.manual_seed(0)
    return Asking().eval()


@pytest.fixture(scope="module")
def fast(model: Asking) -> attnopt.OptimizedModel:
    return attnopt.optimize(model, "fuse", inputs(6, 4), dynamic_shapes="auto")


ALWAYS = [
    "min(6 * x[1], 24 * x[1]) == 6 * x[1]",
    "max(2, x[1] + 1) == x[1] + 1",
    "x[0] * (x[1] + 2) == x[1] * x[0] + 2 * x[0]",
    "x[1] // 2 == x[1] // 2",
    "x[1] <= x[1]",
    "x[0] * x[1] % x[0] == 0",
    "(6 * x[1] + 3) % 3 == 0",
    "x[0] * x[1] // x[1] == x[0]",
    "(8 * x[1] + 5) // 4 == 2 * x[1] + 1",
    "x[1] // 4 * 4 <= x[1]",
    "x[1] % 7 < 7",
    "x[0] * x[1] != 0",
    "x[0] * x[1] >= x[1]",
    "max(1, x[1]) == x[1]",
    "min(x[0], x[1]) <= x[0]",
    "x[0] + 1 != 0 and x[1] >= 1",
    "y[0] <= 40",  # its bounds are 5 and 20
    "y[0] % 32 == y[0]",
    "y[0] // 32 == 0",
    "y[0] >= 5",
]
MAY_FAIL = [
    "min(6 * x[1], 24 * x[0]) == 6 * x[1]",
    "min(x[1], 7) == x[1]",
    "x[1] % 2 == 0",
    "x[1] <= x[0]",
    "x[0] * x[1] % 3 == 0",
    "(6 * x[1] + 3) % 2 == 0",
    "(3 + x[1]) // 4 != 7",
    "x[1] // 4 * 4 == x[1]",
    "x[1] - 1 != 0",
    "x[1] % 7 < 6",
    "x[1] // 4 * 4 + 2 >= x[1]",
    "x[0] * x[1] >= 2",
    "(x[0] - x[1]) // 2 >= 0",
    "(x[0] - x[1]) % 3 == x[0] - x[1]",
    "x[1] % (x[0] - 1) == 0",
    "max(2, x[1]) == x[1]",
    "max(x[0], x[1]) <= x[0]",
    "x[0] == 3 or x[1] >= 2",
    "y[0] <= 19",
    "y[0] % 20 == y[0]",
    "y[0] >= 6",
    "not x[1] == 3",
]
WITHIN = {"x[0]": (1, None), "x[1]": (1, None), "y[0]": (5, 20)}


@pytest.mark.parametrize("relation", ALWAYS + MAY_FAIL)
def test_what_always_holds(relation: str) -> None:
    names = {"max": max, "min": min}
    answers = set()
    for a, b, c in product(range(1, 9), range(1, 30), (5, 6, 19, 20)):
        try:
            answers.add(eval(relation, {"x": (a, b), "y": (c,), **names}))
        except ZeroDivisionError:
            answers.add(False)
    assert (answers == {True}) == (relation in ALWAYS)
    assert always_holds(ast.parse(relation, mode="eval").body, WITHIN) == (relation in ALWAYS)


def test_what_says_the_same_is_told_once() -> None:
    assert told_once(["x[0] != 2 * x[1]", "2 * x[1] != x[0]", "x[1] <= 12", "12 >= x[1]", "x[1] < 13"], WITHIN) == (
        "x[0] != 2 * x[1]",
        "x[1] < 13",
    )
    assert told_once(["x[1] <= 12", "x[1] <= 30", "x[0] + x[1] <= 9"], WITHIN) == ("x[0] + x[1] <= 9",)
    assert told_once(["x[1] <= 12", "x[1] >= 5", "x[0] <= 12"], WITHIN) == ("x[1] <= 12", "x[1] >= 5", "x[0] <= 12")
    long = " + ".join(["x[1]"] * 100) + " == 7"
    assert told_once([long, long, "f(x[1]) == 2"], WITHIN) == (long, "f(x[1]) == 2")


def test_equal_sizes_are_one_size() -> None:
    assert told_once(
        ["16 * x[0] * x[1] == 16 * x[1] * z[0]", "2 * x[0] != z[0]", "16 * x[0] % (2 * z[0]) == 0", "x[1] % z[0] == 0"],
        WITHIN,
    ) == ("z[0] == x[0]", "x[1] % z[0] == 0")
    for kept in ("x[0] == 2 * z[0]", "x[0] + z[0] == 0", "x[0] == z[0] + 1", "x[0] * x[1] == z[0]"):
        assert told_once([kept, "x[0] <= z[0]"], WITHIN)[0] == kept


def test_no_random_relation_that_can_fail_is_dropped() -> None:
    """Against every size from 1 to 12."""
    chance, dropped = random.Random(0), 0

    def term(depth: int) -> str:
        if depth == 0 or chance.random() < 0.25:
            return chance.choice(["x[0]", "x[1]", "y[0]", *map(str, range(1, 7))])
        a, b = term(depth - 1), term(depth - 1)
        how = chance.choice(["+", "-", "*", "*", "//", "%", "min", "max"])
        return f"{how}({a}, {b})" if how.startswith("m") else f"({a} {how} {b})"

    for _ in range(400):
        text = f"{term(3)} {chance.choice(['==', '!=', '<=', '<', '>=', '>'])} {term(2)}"
        if always_holds(ast.parse(text, mode="eval").body, {"y[0]": (2, 9)}):
            dropped += 1
            for a, b, c in product(range(1, 13), range(1, 13), range(2, 10)):
                assert eval(text, {"x": (a, b), "y": (c,), "max": max, "min": min}), text
    assert dropped > 40


BROKEN = {"odd": (7, 4), "a number of fours": (26, 4), "twice as many": (8, 16)}


def test_the_report_names_what_has_to_hold(fast: attnopt.OptimizedModel) -> None:
    assert fast.report.fixed_axes == ("x[2] = 16", "x[1] % 2 == 0", "(3 + x[1]) // 4 != 7", "given_t[0] != 2 * x[1]")
    assert "size constraint: x[1] % 2 == 0" in str(fast.report)


@pytest.mark.parametrize("sizes", BROKEN.values(), ids=BROKEN)
def test_a_call_is_refused(model: Asking, fast: attnopt.OptimizedModel, sizes: tuple[int, int], tmp_path: Path) -> None:
    fast.save(tmp_path / "saved")
    fits = inputs(10, 4)
    for module in (fast, attnopt.load(tmp_path / "saved")):
        assert close(module(*fits), model(*fits))
        with pytest.raises(CaptureError, match="do not fit the captured graph"):
            module(*inputs(*sizes))


@pytest.mark.parametrize("flavor", ["onnxruntime", "standard"])
def test_a_file_stops_by_itself(model: Asking, fast: attnopt.OptimizedModel, flavor: Any, tmp_path: Path) -> None:
    fast.export_onnx(tmp_path / "m.onnx", flavor=flavor)
    session = cpu_session(tmp_path / "m.onnx")
    names = [i.name for i in session.get_inputs()]

    def run(x: Tensor, given: Mapping[str, Tensor]) -> Any:
        known = {"x": x.numpy(), "given_t": given["t"].numpy()}
        return session.run(None, {name: known[name] for name in names})[0]

    fits = inputs(10, 4)
    assert close(run(*fits), model(*fits))
    with pytest.raises(STOPPED, match=r"requires x\[1\] % 2 == 0"):
        run(*inputs(7, 4))
    with pytest.raises(STOPPED, match="requires"):
        run(*inputs(26, 4))


def test_inputs_that_are_no_tensors_stand_between(tmp_path: Path) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, n: int, x: Tensor, mode: str, y: Tensor) -> Tensor:
            made: Tensor = self.attend(x, x, x, need_weights=False)[0] * n + y.sum()
            return made * 2 if x.shape[1] % 2 == 0 else made

    model, args = Counted().eval(), (3, torch.randn(2, 6, 16), "y", torch.randn(5, 4))
    axes = {1: torch.export.Dim.AUTO}
    fast = attnopt.optimize(model, "fuse", args, dynamic_shapes={"n": None, "x": axes, "mode": None, "y": None})
    assert fast.report.fixed_axes == ("x[1] % 2 == 0",)
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert close(loaded(*args), model(*args))
    with pytest.raises(CaptureError, match="do not fit the captured graph"):
        loaded(3, torch.randn(2, 7, 16), "y", args[3])
    fast.export_onnx(tmp_path / "m.onnx")
    with pytest.raises(STOPPED, match=r"requires x\[1\] % 2 == 0"):
        cpu_session(tmp_path / "m.onnx").run(None, {"x": np.zeros((2, 7, 16), np.float32), "y": args[3].numpy()})


def test_a_file_keeps_bounds(tmp_path: Path) -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.attend(x, x, x, need_weights=False)[0]
            return made if x.shape[1] <= 12 else made * 2

    x = torch.randn(2, 6, 16)
    fast = attnopt.optimize(Bounded().eval(), "fuse", (x,), dynamic_shapes="auto")
    assert fast.report.fixed_axes == ("x[2] = 16", "x[1] <= 12")
    fast.export_onnx(tmp_path / "m.onnx")
    session = cpu_session(tmp_path / "m.onnx")
    assert session.run(None, {"x": np.zeros((2, 12, 16), np.float32)})[0].shape == (2, 12, 16)
    with pytest.raises(STOPPED, match=r"requires x\[1\] <= 12"):
        session.run(None, {"x": np.zeros((2, 13, 16), np.float32)})


# ---------------------------------------------------------------- relations as ONNX
def checked(relation: str, dtype: ir.DataType = ir.DataType.FLOAT) -> Any:
    """A model of two inputs that gives the first one back, where ``relation`` holds."""
    names = {"x": ["a", "b"], "y": ["c"]}
    given = [ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(dtype)) for n, s in names.items()]
    copied = ir.node("Identity", [given[0]])
    out = copied.outputs[0]
    out.name, out.shape, out.type = "out", given[0].shape, given[0].type
    graph = ir.Graph(given, [out], nodes=[copied], opset_imports={"": 23}, name="g")
    check_sizes(graph, [relation])
    return cpu_session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


@pytest.mark.parametrize(
    "relation",
    [
        "x[1] % 3 == 0",
        "x[1] - y[0] < -1",
        "(x[1] - y[0]) // 2 != -1",
        "(x[1] - y[0]) % 3 == 1",
        "(x[0] * x[1]) // y[0] >= 3",
        "max(2, x[1]) == min(x[1], 5) and not x[0] > y[0]",
        "x[1] == 3 or -y[0] <= -4",
    ],
)
def test_relations_mean_in_a_file_what_they_say(relation: str) -> None:
    session, seen = checked(relation), set()
    for a in (1, 2):
        for b in range(1, 8):
            for c in range(1, 6):
                x, y = np.ones((a, b), np.float32), np.ones(c, np.float32)
                holds = eval(relation, {"x": x.shape, "y": y.shape, "max": max, "min": min})
                seen.add(holds)
                if holds:
                    assert (session.run(None, {"x": x, "y": y})[0] == x).all()
                else:
                    with pytest.raises(STOPPED):
                        session.run(None, {"x": x, "y": y})
    assert seen == {True, False}


@pytest.mark.parametrize("dtype", [ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT16])
def test_inputs_of_every_type_can_be_checked(dtype: ir.DataType) -> None:
    session = checked("x[1] == 3", dtype)
    values = np.asarray([[0, 1, 1]]).astype(dtype.numpy())
    y = np.ones(2, dtype.numpy())
    assert (session.run(None, {"x": values, "y": y})[0] == values).all()
    with pytest.raises(STOPPED):
        session.run(None, {"x": values[:, :2], "y": y})


def test_what_a_file_cannot_check_is_refused() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["a"]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="g")
    with pytest.raises(ExportError, match="is valid only where"):
        check_sizes(graph, ["math.sqrt(float(x[0])) == 3"])
    with pytest.raises(ExportError, match="is valid only where"):
        check_sizes(graph, ["L['n'] == 3 * x[0]"])
    check_sizes(graph, ["nowhere[0] == 3"])
    assert not len(graph)
