"""Files that round activations to few bits: what two runtimes sum in another order may come out a whole step apart.

Here the first attention gives 1.5 but for rounding, which is then rounded to a whole number and read by the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from onnx_by_hand import DIM, HEADS, Parts, Weights, in_runtime
from torch import Tensor
from torch.nn import functional

import attnopt
from attnopt.onnx.export import in_place
from attnopt.onnx.load import operators, runtime_nodes
from attnopt.passes import LocalWindow
from attnopt.patterns import Window

TIE = 1.5
GROWN = pytest.mark.filterwarnings("ignore:the model amplifies rounding error:attnopt.AttnoptWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    p = Parts()
    p.attention("a", "x")
    p.weights["a/v.weight"][:], p.weights["a/v.bias"][:] = 0, TIE
    p.weights["a/o.weight"], p.weights["a/o.bias"] = np.eye(DIM, dtype=np.float32), np.zeros(DIM, np.float32)
    numbers = p.constant("one", np.float32(1)), p.constant("none", np.uint8(0))
    steps = p.node("DequantizeLinear", [p.node("QuantizeLinear", ["a/o_o", *numbers], "q"), *numbers], "steps")
    same = p.node(
        "MatMul", [p.node("Abs", [steps], "positive"), p.constant("eye", np.eye(DIM, dtype=np.float32))], "same"
    )
    p.node("Identity", [p.attention("b", p.node("Mul", ["x", same], "xs"))], "y")
    p.node("Identity", ["a/o_o"], "sums")
    sizes = ["b", "n", DIM]
    file = tmp_path_factory.mktemp("files") / "m.onnx"
    return p.save(file, {"x": sizes}, {"y": sizes, "sums": sizes, "steps": sizes}, opset=17), p.weights


def numbers(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(0))


def second(x: Tensor, weights: Weights, window: int) -> Tensor:
    """The second attention, by hand."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ torch.tensor(weights[f"b/{name}.weight"]) + torch.tensor(weights[f"b/{name}.bias"])

    q, k, v = (linear(x, role).unflatten(-1, (HEADS, -1)).transpose(1, 2) for role in "qkv")
    seen = oracle.visible(Window(window, window), x.shape[1], x.shape[1], HEADS)
    return linear(functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2), "o")


def assert_as_meant(got: Sequence[Tensor], x: Tensor, weights: Weights, window: int) -> None:
    """Sums are right, steps are whole, and the second attention is that of these steps."""
    y, sums, steps = got
    assert ((sums - TIE).abs() < 1e-5).all()
    assert set(steps.unique().tolist()) <= {1.0, 2.0}
    oracle.assert_same([y], [second(x * steps, weights, window)])


@GROWN
def test_each_attention_is_checked_alone(made: tuple[Path, Weights], tmp_path: Path) -> None:
    """Runtimes disagree by a whole step, which is said, and nothing is refused."""
    file, weights = made
    x = numbers(3, 40)
    ours, there = attnopt.optimize(file, "fuse", (x,)), in_runtime(file, x)
    assert not torch.equal(ours(x)["steps"], there[2])
    assert_as_meant(list(ours(x).values()), x, weights, 40)
    fast, out = attnopt.optimize(file, LocalWindow(4), (x,)), tmp_path / "m.onnx"
    assert [s.status for s in fast.report.sites] == ["rewritten"] * 2
    fast.export_onnx(out)
    for batch, length in ((3, 40), (1, 9), (2, 150)):
        x = numbers(batch, length)
        assert_as_meant(list(fast(x).values()), x, weights, 4)
        assert_as_meant(in_runtime(out, x), x, weights, 4)


@GROWN
def test_an_operator_that_differs_is_left_to_the_file(
    made: tuple[Path, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, weights = made
    x = numbers(3, 40)
    monkeypatch.setitem(operators.OPERATORS, "Abs", lambda x: x * 1.01)
    fast = attnopt.optimize(file, "fuse", (x,))
    assert_as_meant(list(fast(x).values()), x, weights, 40)


@GROWN
def test_what_the_file_runs_itself_must_be_as_in_the_file(
    made: tuple[Path, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    session_of = runtime_nodes._session

    def wrong(model: Tensor) -> Any:
        session = session_of(model)
        return SimpleNamespace(
            get_inputs=session.get_inputs,
            get_outputs=session.get_outputs,
            run=lambda *feed: [1.01 * x for x in session.run(*feed)],
        )

    monkeypatch.setattr(runtime_nodes, "_session", wrong)
    with pytest.raises(attnopt.CaptureError, match="torch and ONNX Runtime disagree"):
        attnopt.optimize(made[0], "fuse", (numbers(3, 40),))


@GROWN
def test_new_nodes_that_differ_are_not_written(
    made: tuple[Path, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = attnopt.optimize(made[0], LocalWindow(4), (numbers(3, 40),))
    nodes_of = in_place._nodes_of

    def swapped(part: Any, inputs: Sequence[str], *rest: Any) -> Any:
        return nodes_of(part, [inputs[0], inputs[2], inputs[1], *inputs[3:]], *rest)

    monkeypatch.setattr(in_place, "_nodes_of", swapped)
    with pytest.raises(attnopt.ExportError, match="ONNX Runtime and torch disagree"):
        fast.export_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
