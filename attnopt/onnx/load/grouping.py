"""Unsupported nodes in groups that ONNX Runtime runs together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import onnx

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Indices of nodes in the file's graph, their inputs from the rest, and their outputs to the rest."""

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def used_by(node: onnx.NodeProto) -> list[str]:
    """Every value that the node reads: its inputs, and the outer values used in its subgraphs."""
    found = dict.fromkeys(name for name in node.input if name)
    for graph in _inner(node):
        found |= dict.fromkeys(_free_in(graph))
    return list(found)


def _inner(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in ([a.g] if a.HasField("g") else [*a.graphs])]


def _free_in(graph: onnx.GraphProto) -> list[str]:
    own = {i.name for i in graph.input} | {i.name for i in graph.initializer}
    own |= {s.values.name for s in graph.sparse_initializer}
    found: dict[str, None] = {}
    for node in graph.node:
        found |= dict.fromkeys(name for name in used_by(node) if name not in own)
        own |= set(node.output)
    return [*found, *(o.name for o in graph.output if o.name not in own)]


def groups(
    nodes: Sequence[onnx.NodeProto],
    unread: Collection[int],
    constants: Collection[str],
    outputs: Sequence[str],
) -> list[Group]:
    """The nodes in ``unread``, grouped if no other node is in between.  ``constants`` are not inputs of a group."""
    made_by = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    uses = [[n for n in used_by(node) if n not in constants] for node in nodes]
    depth: list[int] = []
    for i in range(len(nodes)):
        above = [made_by[n] for n in uses[i] if n in made_by]
        depth.append(max((depth[j] + ((i in unread) != (j in unread)) for j in above), default=int(i in unread)))
    readers: dict[str, set[int]] = {}
    for i, found in enumerate(uses):
        for name in found:
            readers.setdefault(name, set()).add(i)
    for i in unread:
        below = {r for name in nodes[i].output for r in readers.get(name, ())}
        if not uses[i] and below and below <= set(unread):  # an empty sequence: it may be made anywhere
            depth[i] = min(depth[r] for r in below)
    parent = {i: i for i in unread}

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i in unread:
        for name in uses[i]:
            j = made_by.get(name)
            if j in parent and depth[j] == depth[i]:
                parent[root(i)] = root(j)
    members: dict[int, list[int]] = {}
    for i in sorted(unread):
        members.setdefault(root(i), []).append(i)
    return [_group(nodes, tuple(found), uses, readers, outputs) for found in members.values()]


def _group(
    nodes: Sequence[onnx.NodeProto],
    found: tuple[int, ...],
    uses: Sequence[Sequence[str]],
    readers: Mapping[str, set[int]],
    outputs: Sequence[str],
) -> Group:
    own = {name for i in found for name in nodes[i].output if name}
    taken = dict.fromkeys(n for i in found for n in uses[i] if n not in own)
    given = [n for i in found for n in nodes[i].output if n and (readers.get(n, set()) - set(found) or n in outputs)]
    return Group(found, tuple(taken), tuple(dict.fromkeys(given)))


def between(nodes: Sequence[onnx.NodeProto], group: Sequence[int], name: str) -> set[int]:
    """The nodes on any way from ``group`` to the readers of ``name``, these included."""
    made_by = {out: i for i, node in enumerate(nodes) for out in node.output if out}
    readers = {i for i, node in enumerate(nodes) if name in used_by(node)}
    after = set(group)
    for i, node in enumerate(nodes):
        if any(made_by.get(n) in after for n in used_by(node)):
            after.add(i)
    before = set(readers)
    for i in range(len(nodes) - 1, -1, -1):
        if i in before:
            before |= {made_by[n] for n in used_by(nodes[i]) if n in made_by}
    return after & before


def in_order(items: Sequence[T], reads: Callable[[T], Sequence[str]], gives: Callable[[T], Sequence[str]]) -> list[T]:
    """The items in their order, but each after its inputs."""
    made_by = {name: k for k, item in enumerate(items) for name in gives(item) if name}
    waiting = [{made_by[n] for n in reads(item) if n in made_by} - {k} for k, item in enumerate(items)]
    users: list[list[int]] = [[] for _ in items]
    for k, needed in enumerate(waiting):
        for j in needed:
            users[j].append(k)
    from heapq import heapify, heappop, heappush

    ready = [k for k, needed in enumerate(waiting) if not needed]
    heapify(ready)
    ordered: list[T] = []
    while ready:
        k = heappop(ready)
        ordered.append(items[k])
        for user in users[k]:
            waiting[user].discard(k)
            if not waiting[user]:
                heappush(ready, user)
    if len(ordered) < len(items):
        raise ValueError("the nodes depend on each other")
    return ordered
