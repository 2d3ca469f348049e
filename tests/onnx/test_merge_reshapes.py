"""Reshapes that are left out, against ONNX Runtime on the graph as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from attnopt.onnx.export.builder import Builder
from attnopt.onnx.export.merge_reshapes import join_reshapes

BATCH, LENGTH, HEADS, SIZE = "batch", "length", 3, 4
GIVEN = (BATCH, LENGTH, HEADS * SIZE)
Step = tuple[str, Any, dict[str, int]]


def to(*sizes: int, **attributes: int) -> Step:
    return "Reshape", sizes, attributes


HEADS_APART = to(0, 0, HEADS, SIZE)
CHAINS: dict[str, tuple[list[Step], int]] = {  # and how many steps are left, before the last operator
    "there and back": ([HEADS_APART, to(0, 0, HEADS * SIZE)], 0),
    "the last axis is computed": ([HEADS_APART, to(0, 0, -1)], 0),
    "tokens and batch in one": ([to(-1, HEADS * SIZE), to(-1, HEADS, SIZE)], 1),
    "zeros that copy from another axis": ([to(0, HEADS, -1, SIZE), to(0, 0, -1)], 2),
    "a zero behind two axes made one": ([to(-1, HEADS * SIZE), to(0, HEADS, SIZE)], 2),
    "an axis more in front": ([("Unsqueeze", (0,), {}), to(0, -1, HEADS * SIZE)], 2),
    "an axis more and back": ([("Unsqueeze", (2,), {}), to(0, 0, -1)], 0),
    "two unknown": ([HEADS_APART, to(-1, 0, HEADS * SIZE)], 0),
    "three": ([HEADS_APART, to(0, 0, -1), HEADS_APART, to(0, 0, 1, -1)], 1),
}


def model(chain: list[Step]) -> ir.Model:
    given = ir.Value(name="given", shape=ir.Shape(GIVEN), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([given], [], nodes=[], name="chain", opset_imports={"": 23})
    b = Builder(graph, "step")
    value = given
    for op_type, sizes, attributes in chain:
        value = b.op(op_type, value, b.ints(*sizes), **attributes)
        if op_type == "Unsqueeze":
            value.shape = ir.Shape([*GIVEN[: sizes[0]], 1, *GIVEN[sizes[0] :]])
    result = b.op("Neg", value)
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.extend(b.nodes)
    graph.outputs.append(result)
    return ir.Model(graph, ir_version=10)


def run(made: ir.Model, given: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"given": given})
    return np.asarray(result)


def left(made: ir.Model) -> int:
    """Steps on the way from the output to the input."""
    count, value = 0, made.graph.outputs[0].producer().inputs[0]  # type: ignore[union-attr]
    while value is not None and (node := value.producer()) is not None:
        count, value = count + 1, node.inputs[0]
    return count


@pytest.mark.parametrize(("chain", "steps"), CHAINS.values(), ids=CHAINS)
def test_the_result_is_the_same(chain: list[Step], steps: int) -> None:
    made = model(chain)
    givens = [np.random.default_rng(0).standard_normal((b, n, HEADS * SIZE), np.float32) for b, n in ((2, 5), (5, 3))]
    want = [run(made, given) for given in givens]
    join_reshapes(made.graph)
    assert left(made) == steps
    for given, wanted in zip(givens, want, strict=True):
        np.testing.assert_array_equal(run(made, given), wanted, strict=True)


def test_a_result_of_the_model_keeps_its_name() -> None:
    made = model([HEADS_APART, to(0, 0, -1)])
    last = made.graph.outputs[0].producer()
    assert last is not None
    made.graph.outputs[0] = last.inputs[0]  # type: ignore[assignment]
    made.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    name = made.graph.outputs[0].name
    join_reshapes(made.graph)
    assert made.graph.outputs[0].name == name
    given = np.ones((2, 5, HEADS * SIZE), np.float32)
    np.testing.assert_array_equal(run(made, given), given)
