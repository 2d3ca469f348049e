"""What stands around the attentions, in the form in which ONNX Runtime is fastest on a CPU."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from attnopt.to_onnx.reshaping import join_reshapes
from attnopt.to_onnx.rotary import fuse_rotations


def settle(model: ir.Model, contrib: bool) -> None:
    """Change the neighbours' form, never what they compute.  ``contrib``: the file is for ONNX Runtime alone."""
    _RMS_NORMALIZATIONS.apply_to_model(model)
    fuse_rotations(model.graph)
    join_reshapes(model.graph)
    if contrib:
        _keep_sums_apart(model.graph)


class _RmsNormalization(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """``x / sqrt(mean(x ** 2) + epsilon) * scale`` as the one operator that ONNX has for it."""

    def pattern(self, op: Any, x: Any, scale: Any, epsilon: Any) -> Any:
        mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
        return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))) * scale

    def check(self, context: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
        made = pattern.MatchResult()
        if x.dtype != ir.DataType.FLOAT or scale.dtype != ir.DataType.FLOAT:
            return made.fail("not float32", x)
        if x.shape is None or scale.shape is None or list(scale.shape) != [x.shape[-1]]:
            return made.fail("the scale is not one number for each feature", scale)
        if epsilon.const_value is None or epsilon.const_value.size != 1:
            return made.fail("epsilon is not one known number", epsilon)
        return made

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value) -> Any:
        assert epsilon.const_value is not None
        return op.RMSNormalization(x, scale, axis=-1, epsilon=epsilon.const_value.numpy().item())


_RMS_NORMALIZATIONS = pattern.RewriteRuleSet([_RmsNormalization.rule()], commute=True)


def _keep_sums_apart(graph: ir.Graph) -> None:
    """Write ``Sum`` for an ``Add`` that ONNX Runtime would fuse with its neighbour when it loads the file.

    With a layer normalization behind it it would become an operator that takes 5 to 7 times as long on a CPU as the two
    apart; with a product of three axes before it a product of two, between two reshapes.
    """
    for node in graph.all_nodes():
        added = node.inputs[0].producer() if _is(node, "LayerNormalization") and node.inputs[0] is not None else node
        if added is not None and _is(added, "Add") and (added is not node or _is_bias(node)):
            added.op_type = "Sum"
    for node in graph.all_nodes():
        if _is(node, "Sum"):
            _sum_at_once(node)


def _sum_at_once(node: ir.Node) -> None:
    """A bias and what is added after it in one pass over the numbers, in the same order."""
    for place, value in enumerate(node.inputs):
        if value is None or value.is_graph_output() or len(value.uses()) > 1:
            continue
        inner = value.producer()
        if inner is not None and _is(inner, "Sum"):
            others = [v for i, v in enumerate(node.inputs) if i != place]
            node.resize_inputs(len(inner.inputs) + len(others))
            for i, v in enumerate((*inner.inputs, *others)):
                node.replace_input_with(i, v)
            return


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and (node.domain, node.op_type) == ("", op_type)


def _is_bias(added: ir.Node) -> bool:
    """One of the two is a product, of floats along three axes or more."""
    products = [v for v in added.inputs if v is not None and _is(v.producer(), "MatMul")]
    return any(v.dtype == ir.DataType.FLOAT and v.shape is not None and v.shape.rank() > 2 for v in products)
