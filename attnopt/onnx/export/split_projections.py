"""Unpacked projections: ONNX Runtime would copy the outputs of a Split, and each of three products may as well
write its own result."""

from __future__ import annotations

from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.match.projections import ways_of_head
from attnopt.slicing.packed_projections import built_anew, forks
from attnopt.slicing.selector import Selector
from attnopt.slicing.weight_store import Weights


def apart(emit: Emitter, weights: Weights, q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The same queries, keys and values, [B, H, L, D] each, without common projections."""
    operands = {"q": q, "k": k, "v": v}
    ways = {role: ways_of_head(node, 1) for role, node in operands.items()}
    shared = forks(operands, ways)
    if not shared:
        return q, k, v
    select = Selector(emit, weights, {}, built_anew(shared, operands, ways), shared)
    return select.select(q, {}), select.select(k, {}), select.select(v, {})
