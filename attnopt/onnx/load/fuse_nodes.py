"""Fusion of several ONNX nodes into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnopt.onnx.load.operators import SAFE_SOFTMAX

if TYPE_CHECKING:
    import onnx


def fused(nodes: Sequence[onnx.NodeProto], zeros: frozenset[str] = frozenset()) -> list[onnx.NodeProto]:
    """``Where(IsNaN(p), 0, p)`` of a softmax p, as torch writes its fused attention: zeros for fully masked queries.

    ``zeros``: the names of constants that are 0.
    """
    import onnx

    made_by = {output: node for node in nodes for output in node.output}
    found: list[onnx.NodeProto] = []
    for node in nodes:
        softmax = _softmax_behind(node, made_by, zeros)
        if softmax is not None:
            safe = onnx.NodeProto()
            safe.CopyFrom(softmax)
            safe.op_type = SAFE_SOFTMAX
            del safe.output[:]
            safe.output.extend(node.output)
            node = safe
        found.append(node)
    return found


def _softmax_behind(
    node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto], zeros: frozenset[str]
) -> onnx.NodeProto | None:
    if node.op_type != "Where" or node.input[1] not in zeros:
        return None
    condition, softmax = made_by.get(node.input[0]), made_by.get(node.input[2])
    if condition is None or softmax is None or (condition.op_type, softmax.op_type) != ("IsNaN", "Softmax"):
        return None
    return softmax if condition.input[0] == node.input[2] else None
