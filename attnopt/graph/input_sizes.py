"""Sizes are read from inputs: read from a projection, a size would keep it when a smaller one replaces it."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, input_axes, inputs_of, is_call, operand, value

Places = Mapping[sympy.Expr, tuple[fx.Node, int]]


def places_of_sizes(graph: fx.Graph) -> Places:
    """An input and an axis of it, for each size that some input has and that may vary."""
    found: dict[sympy.Expr, tuple[fx.Node, int]] = {}
    for _, node, axis, size in input_axes(inputs_of(graph)):
        if isinstance(size, torch.SymInt):
            found.setdefault(size.node.expr, (node, axis))
    return found


def at_the_start(graph: fx.Graph) -> Emitter:
    return Emitter(graph, next(n for n in graph.nodes if n.op not in ("get_attr", "placeholder")))


def read_sizes_from_inputs(graph: fx.Graph) -> None:
    places, emit = places_of_sizes(graph), at_the_start(graph)
    for node in list(graph.nodes):
        if is_call(node, aten.sym_size.int) and operand(node).op != "placeholder":
            size = value(node)
            if isinstance(size, torch.SymInt) and size.node.expr in places:
                node.replace_all_uses_with(emit.call(aten.sym_size.int, *places[size.node.expr]))
