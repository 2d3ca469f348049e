"""Sizes are read from inputs: read from a projection, a size would keep it when a smaller one replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import sympy
import torch
from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, input_axes, inputs_of, is_call, operand, value


@dataclass(frozen=True)
class InputSizes:
    """``places``: an input and an axis of it, for each size that some input has and that may vary."""

    places: Mapping[sympy.Expr, tuple[fx.Node, int]]
    emit: Emitter

    @classmethod
    def of(cls, graph: fx.Graph) -> Self:
        found: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        for _, node, axis, size in input_axes(inputs_of(graph)):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (node, axis))
        return cls(found, Emitter(graph, next(n for n in graph.nodes if n.op not in ("get_attr", "placeholder"))))

    def read(self, size: object) -> fx.Node | None:
        """The node that reads it from an input; None if no input has it."""
        if not isinstance(size, torch.SymInt) or size.node.expr not in self.places:
            return None
        return self.emit.call(aten.sym_size.int, *self.places[size.node.expr])


def read_sizes_from_inputs(graph: fx.Graph) -> InputSizes:
    """In the place of the nodes that read them from other tensors."""
    sizes = InputSizes.of(graph)
    for node in list(graph.nodes):
        is_asked = is_call(node, aten.sym_size.int) and operand(node).op != "placeholder"
        if is_asked and (found := sizes.read(value(node))) is not None:
            node.replace_all_uses_with(found)
    return sizes
