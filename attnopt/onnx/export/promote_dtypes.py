"""Implicit dtype promotion made explicit where torch's exporter cannot.

``1.0 - mask`` of integers becomes a subtraction whose first operand is a number, and the exporter's type promotion has no
form for that one, nor for an ``einsum`` of integers and floats, as of positions and rotary frequencies.
"""

from __future__ import annotations

from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, dtype, is_tensor


def promoted(gm: fx.GraphModule) -> None:
    """What such an operator reads is converted to the type of its result first."""
    for target in (aten.rsub.Scalar, aten.einsum.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            for x in filter(is_tensor, node.all_input_nodes):
                if dtype(x) != dtype(node):
                    emit = Emitter(gm.graph, node)
                    node.replace_input_with(x, emit.call(aten._to_copy.default, x, dtype=dtype(node)))
