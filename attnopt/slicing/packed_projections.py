"""Packed projections: tensors projected together for several roles of an attention, and the nodes of each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, permutations

from torch import fx

from attnopt.graph.nodes import ancestors


def forks(operands: Mapping[str, fx.Node], ways: Mapping[str, Sequence[fx.Node]]) -> set[fx.Node]:
    """Of the nodes between one role and its weights (``ways``), those that another role also depends on."""
    above = {role: set(ancestors(node)) for role, node in operands.items()}
    return {n for one, other in permutations(operands, 2) for n in above[other].intersection(ways[one])}


def built_anew(
    forked: set[fx.Node], operands: Mapping[str, fx.Node], ways: Mapping[str, Sequence[fx.Node]]
) -> list[fx.Node]:
    """The nodes to recompute for each role, so that none needs a packed tensor."""
    return [*chain(*ways.values()), *_below(forked, operands)]


def _below(forked: set[fx.Node], operands: Mapping[str, fx.Node]) -> list[fx.Node]:
    """Values computed from a packed tensor between it and an operand, such as the length that a norm divides by."""
    above = {n for node in operands.values() for n in ancestors(node)}
    reached = {n for n in forked if n.op == "call_function"}
    made = []
    for node in next(iter(operands.values())).graph.nodes:
        if node in above and node not in reached and reached.intersection(node.all_input_nodes):
            reached.add(node)
            made.append(node)
    return made
