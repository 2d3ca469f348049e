"""The product of rows, sorted into groups, with each group's own matrix: how a mixture of experts computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

GROUPED = "transformers::grouped_mm_fallback"  # the form of transformers' experts in torch.export, except in bfloat16


def grouped_products(gm: fx.GraphModule) -> dict[Callable[..., object], Callable[..., object]]:
    """For ``torch.onnx.export``: the operators of this meaning that the graph calls, each with its form in plain ONNX."""
    called = {n.target for n in gm.graph.nodes if n.op == "call_function"}
    return {op: _by_rows for op in called if (schema := getattr(op, "_schema", None)) and schema.name == GROUPED}


def _by_rows(rows: Any, matrices: Any, ends: Any) -> Any:
    """[S, N] of ``rows`` [S, K], ``matrices`` [E, K, N] and the groups' ``ends`` [E].  Rows after the last end give 0.

    One product per group, over only its rows, so nothing is computed for other groups.
    """
    from onnxscript import opset18 as op

    groups, _, columns = matrices.shape
    ends = op.Cast(ends, to=7)  # int64, as Slice requires
    start, first_axis, parts = op.Constant(value_ints=[0]), op.Constant(value_ints=[0]), []
    for group in range(groups):
        end = op.Gather(ends, op.Constant(value_ints=[group]))
        matrix = op.Gather(matrices, op.Constant(value_int=group))
        parts.append(op.MatMul(op.Slice(rows, start, end, first_axis), matrix))
        start = end
    left = op.Sub(op.Shape(rows, start=0, end=1), start)
    zeros = op.CastLike(op.ConstantOfShape(op.Concat(left, op.Constant(value_ints=[columns]), axis=0)), rows)
    return op.Concat(*parts, zeros, axis=0)
