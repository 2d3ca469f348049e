"""The part of a graph that is linear in what attentions and MLPs write: from its outputs, or other nodes, back to there.

Norms count as linear: their scale is taken as it is.  A product of two values that both depend on the input ends the path,
unless one of them is one number for each token, as the scale of a norm that is written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.graph.interpreter import Forward, Schedule
from attnopt.graph.nodes import arg, calls, is_tensor, run_call, value
from attnopt.graph.ops import ADD, FACTORS, SUB, Kind, named, of
from attnopt.match.find import Found
from attnopt.observe.frozen_norms import LAYER_NORM, RMS_NORM, layer_norm, rms_norm
from attnopt.observe.residual import START, Residual, carried
from attnopt.slicing.selection import is_weight

BIAS = "bias"
_FIRST = of(
    Kind.RESHAPE, Kind.ONES, Kind.PERMUTE, Kind.COPY, Kind.CAST, Kind.DROPOUT, Kind.EXPAND, Kind.REPEAT, Kind.SLICE, Kind.SPLIT,
    Kind.PIECE, Kind.LOOKUP, Kind.MOVE,
) | named("mean sum neg")  # fmt: skip
_JOINS = of(Kind.JOIN)


class LinearPath:
    """``followed``: for each node of the path the operands in which it is linear; ``ends``: where it ends, by name: at the
    outputs of heads, under the name of their attention, at other branches of residual streams, and at biases."""

    def __init__(
        self, graph: fx.Graph, found: Sequence[Found], residual: Residual, starts: Sequence[fx.Node] | None = None
    ) -> None:
        """``starts``: where the path begins; by default at the outputs of the graph."""
        self.sites = {f.raised.region.out.node: f for f in found}
        stops = {n: f.site.name for n, f in self.sites.items()}
        stops |= {b.node: b.name for b in residual.branches if b.site is None}
        self.followed: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.ends: dict[fx.Node, str] = {}
        stack = [n for n in (graph.output_node().all_input_nodes if starts is None else starts) if _is_real(n)]
        seen = set(stack)
        while stack:
            node = stack.pop()
            below = () if node in stops else tuple(n for n in linear_in(node) if _is_real(n))
            if not below:
                self.ends[node] = stops.get(node, BIAS if node.op == "get_attr" else START)
                continue
            self.followed[node] = below
            fresh = [n for n in below if n not in seen]
            seen.update(fresh)
            stack += fresh


def linear_in(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands in which ``node`` is linear together, weights apart; none if there are none."""
    if node.op != "call_function" or not node.args:
        return ()
    if calls(node, _JOINS):
        parts = node.args[0]
        return tuple(p for p in parts if isinstance(p, fx.Node)) if isinstance(parts, (list, tuple)) else ()
    if calls(node, ADD) or calls(node, SUB):
        return () if node.kwargs else tuple(a for a in node.args[:2] if isinstance(a, fx.Node))
    if calls(node, LAYER_NORM):
        return tuple(a for a in (arg(node, 0), arg(node, 3)) if isinstance(a, fx.Node))
    if calls(node, RMS_NORM) or calls(node, _FIRST):
        return (node.args[0],) if isinstance(node.args[0], fx.Node) else ()
    if calls(node, FACTORS):
        below = carried(node)
        return () if below is None else (below,)
    return _of_product(node)


def _of_product(node: fx.Node) -> tuple[fx.Node, ...]:
    if calls(node, named("linear")):
        weight, data, bias = arg(node, 1), arg(node, 0), arg(node, 2)
    elif calls(node, named("addmm")) and not node.kwargs:
        weight, data, bias = arg(node, 2), arg(node, 1), arg(node, 0)
    elif calls(node, named("mm matmul")):
        weight, data, bias = arg(node, 1), arg(node, 0), None
    else:
        return ()
    if not isinstance(weight, fx.Node) or not is_weight(weight):
        return ()
    return tuple(x for x in (data, bias) if isinstance(x, fx.Node))


def _is_real(node: fx.Node) -> bool:
    found = value(node)
    if isinstance(found, (list, tuple)):
        return bool(found) and all(isinstance(x, Tensor) and x.is_floating_point() for x in found)
    return is_tensor(node) and bool(found.is_floating_point())


class LinearRun(Forward):
    """Runs a graph so that gradients flow along a linear path alone.  ``leaves``: the values at its ends."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[fx.Node, Any], schedule: Schedule, path: LinearPath) -> None:
        self.path = path
        self.leaves: dict[fx.Node, Tensor] = {}
        super().__init__(gm, {n: self._end(n, x) for n, x in values.items()}, schedule)

    def leaf(self, node: fx.Node) -> object:
        return self._end(node, super().leaf(node)) if node.op == "get_attr" else super().leaf(node)

    def call(self, node: fx.Node, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        followed = self.path.followed.get(node)
        if followed is None:
            return self._end(node, super().call(node, args, kwargs))

        def given(n: fx.Node) -> Any:
            x = self.values[n]
            return x if n in followed or not isinstance(x, Tensor) else x.detach()

        own: tuple[Any, Any] = fx.node.map_arg((node.args, node.kwargs), given)
        with torch.enable_grad():
            if calls(node, LAYER_NORM):
                return layer_norm(own[0][0], own[0][0].detach(), *own[0][1:], **own[1])
            if calls(node, RMS_NORM):
                return rms_norm(own[0][0], own[0][0].detach(), *own[0][1:], **own[1])
            return run_call(node, *own)

    def _end(self, node: fx.Node, x: object) -> object:
        if node not in self.path.ends or not isinstance(x, Tensor):
            return x
        self.leaves[node] = x.detach().requires_grad_()
        return self.leaves[node]
