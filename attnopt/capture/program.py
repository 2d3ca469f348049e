"""A captured model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.sizes import hint
from attnopt.capture.dynamic_axes import Asked, Auto, fixed_axes, outside
from attnopt.capture.flat_call import Form
from attnopt.graph.nodes import input_axes, input_name, inputs_of


@dataclass(frozen=True)
class Program:
    """A captured model: ``module`` is a graph of functional aten operators, called as the model is.

    ``shapes`` are the dynamic shapes in torch.export's notation, ``fixed_axes`` the axes that were to be dynamic and are not,
    and the constraints between the others.  ``own`` is the user's example if the program was captured with another one;
    ``narrower`` is the fallback request if the dynamic axes prove too many.
    """

    module: fx.GraphModule
    inputs: CallInputs
    shapes: object = None
    fixed_axes: tuple[str, ...] = ()
    route: str = "export"
    own: CallInputs | None = None
    narrower: Auto | None = None
    form: Form | None = None  # if the model takes or returns objects; the inputs are then flat

    @property
    def outside(self) -> list[tuple[int, fx.Node]]:
        """The graph's inputs that are no parts of objects, with their numbers."""
        is_inside = (lambda _: False) if self.form is None else self.form.inputs.is_inside
        return [(i, n) for i, n in enumerate(inputs_of(self.module.graph)) if not is_inside(i)]

    @property
    def examples(self) -> tuple[CallInputs, ...]:
        """What was captured with first."""
        return (self.inputs, *(() if self.own is None else (self.own,)))

    @property
    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of the user's example, by the names of the graph's inputs."""
        leaves, nodes = pytree.tree_leaves(self.own or self.inputs), inputs_of(self.module.graph)
        named = zip(nodes, leaves, strict=True) if len(nodes) == len(leaves) else ()
        return {input_name(n): tuple(x.shape) for n, x in named if isinstance(x, Tensor)}

    def own_size(self, size: int | torch.SymInt) -> int:
        """What a size of the graph is for the user's example."""
        shapes = self.own_shapes if isinstance(size, torch.SymInt) else {}
        of_axes = input_axes(n for n in inputs_of(self.module.graph) if input_name(n) in shapes)
        known = {
            n.node.expr: shapes[input_name(node)][axis] for _, node, axis, n in of_axes if isinstance(n, torch.SymInt)
        }
        if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols <= known.keys():
            return hint(size)
        return int(size.node.expr.subs(known))

    def told(self, asked: Asked) -> Program:
        """With every axis in ``asked`` that is not dynamic listed as static."""
        fixed = fixed_axes([node for _, node in self.outside], outside(asked))
        return replace(self, fixed_axes=(*fixed, *(t for t in self.fixed_axes if t not in fixed)))
