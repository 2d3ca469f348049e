"""Implicit dtype promotion made explicit where torch's exporter cannot.

``1.0 - mask`` of integers becomes a subtraction whose first operand is a number, and the exporter's type promotion has no
form for that one.
"""

from __future__ import annotations

from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, is_tensor, value


def promoted(gm: fx.GraphModule) -> None:
    """What is subtracted from a number is converted to the type of the result first."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        x, dtype = node.args[0], value(node).dtype
        if is_tensor(x) and value(x).dtype != dtype:
            node.replace_input_with(x, Emitter(gm.graph, node).call(aten._to_copy.default, x, dtype=dtype))
