"""Unpacked projections: ONNX Runtime would copy the outputs of a Split, and each of three products may as well
write its own result."""

from __future__ import annotations

from torch import fx

from attnopt.ir.operands import Operands
from attnopt.match.projections import ways_of_head
from attnopt.slicing.packed_projections import forks, take_apart
from attnopt.slicing.weight_store import Weights


def apart(weights: Weights, operands: Operands[fx.Node]) -> Operands[fx.Node]:
    """The same, of which queries, keys and values have no common projections."""
    projected = {"q": operands.q, "k": operands.k, "v": operands.v}
    made = take_apart(forks(projected, {role: ways_of_head(node, 1) for role, node in projected.items()}), weights)
    return operands.map(lambda _, node: made.get(node, node))
