"""What stands around the attentions, in the form in which ONNX Runtime is fastest on a CPU."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from attnopt.to_onnx.rotary import fuse_rotations


def settle(model: ir.Model, contrib: bool) -> None:
    """Change the neighbours' form, never what they compute.  ``contrib``: the file is for ONNX Runtime alone."""
    _RMS_NORMALIZATIONS.apply_to_model(model)
    fuse_rotations(model.graph)
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
    """Write ``Sum`` for an ``Add`` in front of a layer normalization.

    ONNX Runtime would fuse the pair when it loads the file, into an operator that takes 5 to 7 times as long on a CPU
    as the two apart.
    """
    for node in graph.all_nodes():
        if node.op_type != "LayerNormalization" or node.domain or node.inputs[0] is None:
            continue
        added = node.inputs[0].producer()
        if added is not None and (added.domain, added.op_type) == ("", "Add"):
            added.op_type = "Sum"
