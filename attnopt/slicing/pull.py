"""Selections pulled upwards: ``select(op(x), i)`` rewritten as ``op(select(x, i'))``, operator by operator.

This is how attnopt knows which weight rows make a head, and how it removes one: the selection of some heads at an
attention's input is propagated backward through views, rotations, norms and concatenations to the weights, where it
becomes a smaller weight.  Each rule is an exact identity; without a rule, the selection stops.
"""

from __future__ import annotations

from torch import fx

from attnopt.graph.nodes import is_tensor
from attnopt.graph.ops import is_pointwise
from attnopt.graph.select import Selection
from attnopt.slicing.pull_compute import COMPUTE, elementwise
from attnopt.slicing.pull_layout import LAYOUT
from attnopt.slicing.selection import Pulled

_RULES = LAYOUT | COMPUTE


def pull(node: fx.Node, selection: Selection) -> Pulled | None:
    """How to compute ``select(node, selection)`` from selections of the operands of ``node``; None: no rule."""
    if node.op != "call_function":
        return None
    rule = _RULES.get(node.target)
    if rule is None and is_pointwise(node.target) and is_tensor(node):
        rule = elementwise
    return None if rule is None else rule(node, selection)
