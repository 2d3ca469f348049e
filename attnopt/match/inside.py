"""What lies between two nodes of a graph, and which of it is used elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
from torch import fx

from attnopt.graph.axes import Axes, length, resolve_all
from attnopt.graph.nodes import is_tensor
from attnopt.match.rejection import unreadable


def unify(product_axes: Axes, axes: Axes, node: fx.Node) -> None:
    """Make the fresh atoms of a product's operand the atoms that are already known."""
    for new, old in zip(product_axes, resolve_all(axes), strict=True):
        if not new and not old:
            continue
        if len(new) != 1 or new[0].size != length(old):
            raise unreadable(node, "weights whose axes match the values")
        if new != old:
            new[0].parts = old


def between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Every node on a path from ``start`` to ``end``, both included: the convex region between them."""
    dag: nx.DiGraph[fx.Node] = nx.DiGraph()
    order = {n: i for i, n in enumerate(start.graph.nodes)}
    frontier, seen = [start], {start}
    while frontier:
        n = frontier.pop()
        for user in n.users:
            if order[user] <= order[end]:
                dag.add_edge(n, user)
                if user not in seen:
                    seen.add(user)
                    frontier.append(user)
    if end not in dag:
        return [end]
    inner = (nx.descendants(dag, start) | {start}) & (nx.ancestors(dag, end) | {end})
    return sorted(inner, key=lambda n: order[n])


def escaping(path: Iterable[fx.Node], out: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes inside the region that something outside uses."""
    inside = set(path)
    return tuple(
        n for n in dict.fromkeys(path) if n is not out and any(u not in inside and not _dead(u) for u in n.users)
    )


def _dead(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.users and is_tensor(node)
