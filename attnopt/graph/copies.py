"""Copies of a graph, which share its weights."""

from __future__ import annotations

from torch import fx


def copy_program(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of the graph that shares every weight, and the map from old nodes to new ones."""
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, table)
    old = next(iter(reversed(gm.graph.nodes)))
    new = graph.output(result)
    new.meta.update(old.meta)
    graph.set_codegen(gm.graph._codegen)
    module = fx.GraphModule(gm, graph)
    for name in ("_in_spec", "_out_spec"):
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))
    return module, table
