"""The values of some nodes where a graph is called."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.graph.interpreter import Forward, Schedule
from attnopt.graph.nodes import inputs_of


def recorded(gm: fx.GraphModule, nodes: Collection[fx.Node], inputs: object) -> dict[fx.Node, Any]:
    """What ``nodes`` give where the graph is called with the leaves of ``inputs``; tensors are copies.

    Nothing is written into the module's state.
    """
    placeholders = inputs_of(gm.graph)
    given = dict(zip(placeholders, pytree.tree_leaves(inputs), strict=True))
    run = Forward(gm, given, Schedule(gm.graph, {n: (n,) for n in nodes}))
    found: dict[fx.Node, object] = {}
    for node in run.schedule.stops:
        run.up_to(node)
        found[node] = _copied(run(node))
    return found


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value  # an input may change later
