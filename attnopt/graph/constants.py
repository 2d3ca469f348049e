"""Tensors filled with one number, with the shape of another tensor."""

from __future__ import annotations

from torch import fx

from attnopt.graph.nodes import arg, aten, is_call


def filling(node: fx.Node) -> float | None:
    """The fill value of one of torch's fill functions; None if it is not a literal."""
    if is_call(node, aten.ones_like.default, aten.new_ones.default):
        return 1
    if is_call(node, aten.zeros_like.default, aten.new_zeros.default):
        return 0
    made = arg(node, 2 if is_call(node, aten.new_full.default) else 1)
    return made if isinstance(made, (int, float)) else None
