"""Operators around the attentions, in the form that is fastest in ONNX Runtime on CPU."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from attnopt.onnx.export.builder import is_a, made_by
from attnopt.onnx.export.choose_form import WITH_ATTENTION
from attnopt.onnx.export.fuse_rotary import fuse_rotations
from attnopt.onnx.export.merge_reshapes import join_reshapes


def settle(model: ir.Model, contrib: bool, opset: int = WITH_ATTENTION) -> None:
    """Change the form of neighbouring operators, never their result.  ``contrib``: the file is only for ONNX Runtime."""
    if opset >= WITH_ATTENTION:
        _RMS_NORMALIZATIONS.apply_to_model(model)
        fuse_rotations(model.graph)
    join_reshapes(model.graph)
    if contrib and opset >= WITH_BROADCAST_SUM:
        _keep_sums_apart(model.graph)


WITH_BROADCAST_SUM = 8  # the first opset whose Sum broadcasts


class _RmsNormalization(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``x / sqrt(mean(x ** 2) + epsilon) * scale`` as one ONNX operator."""

    def pattern(self, op: Any, x: object, scale: object, epsilon: object) -> object:
        mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
        return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))) * scale

    def check(self, context: object, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: object) -> object:
        made = pattern.MatchResult()
        if x.dtype != ir.DataType.FLOAT or scale.dtype != ir.DataType.FLOAT:
            return made.fail("not float32", x)
        if x.shape is None or scale.shape is None or list(scale.shape) != [x.shape[-1]]:
            return made.fail("the scale is not one number for each feature", scale)
        if epsilon.const_value is None or epsilon.const_value.size != 1:
            return made.fail("epsilon is not one known number", epsilon)
        return made

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value) -> object:
        assert epsilon.const_value is not None
        return op.RMSNormalization(x, scale, axis=-1, epsilon=epsilon.const_value.numpy().item())


_RMS_NORMALIZATIONS = pattern.RewriteRuleSet([_RmsNormalization.rule()], commute=True)


def _keep_sums_apart(graph: ir.Graph) -> None:
    """Write ``Sum`` for an ``Add`` that ONNX Runtime would fuse with its neighbour when it loads the file.

    Before a layer normalization, it would become an operator that takes 5 to 7 times as long on CPU as the two
    separately; after a product of three axes, a product of two between two reshapes.
    """
    for node in graph.all_nodes():
        if is_a(node, "LayerNormalization") and (added := made_by(node.inputs[0], "Add")) is not None:
            added.op_type = "Sum"
        elif is_a(node, "Add") and any(map(_is_product, node.inputs)):
            node.op_type = "Sum"
    for node in graph.all_nodes():
        if is_a(node, "Sum"):
            _sum_at_once(node)


def _is_product(value: ir.Value | None) -> bool:
    """Of floats, along three axes or more."""
    if made_by(value, "MatMul") is None or value is None or value.shape is None:
        return False
    return value.dtype == ir.DataType.FLOAT and value.shape.rank() > 2


def _sum_at_once(node: ir.Node) -> None:
    """A bias and the next addend in one pass, in the same order."""
    for place, value in enumerate(node.inputs):
        inner = made_by(value, "Sum")
        if inner is None or value is None or value.is_graph_output() or len(value.uses()) > 1:
            continue
        others = [v for i, v in enumerate(node.inputs) if i != place]
        node.resize_inputs(len(inner.inputs) + len(others))
        for i, v in enumerate((*inner.inputs, *others)):
            node.replace_input_with(i, v)
        return
