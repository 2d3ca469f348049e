"""What an optimized graph computes otherwise than the file that it was captured of, in terms of the file's values."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnopt.base.sizes import is_static
from attnopt.compiler.origin import FileOrigin
from attnopt.errors import ExportError
from attnopt.graph.emitter import _key as key_of
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import RESHAPES, ancestors, aten, get_attr, inputs_of, is_call, is_tensor, operand, value
from attnopt.graph.value_names import ORIGIN, names_of
from attnopt.lower.attention_calls import is_attention_call

_LAYOUT = (
    *RESHAPES, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.clone.default, aten.alias.default, aten.mT.default, aten.t.default,
)  # fmt: skip


SHARED = "shared "  # how the names of values begin that the file does not have


@dataclass(frozen=True)
class Change:
    """Values of the file that new nodes compute, and the values of the file that these read.

    ``made``: name of a value -> node of the optimized graph.  ``read``: node of the optimized graph -> name of a value.
    ``weights``: stored tensors of the optimized graph that the file does not have.
    """

    made: dict[str, fx.Node] = field(default_factory=dict)
    read: dict[fx.Node, str] = field(default_factory=dict)
    weights: tuple[fx.Node, ...] = ()


class _Identities:
    """A number for each node, the same for nodes that compute the same of the same inputs and weights."""

    def __init__(self) -> None:
        self._table: dict[Hashable, int] = {}
        self.of: dict[fx.Node, int] = {}

    def add(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            self.of[node] = self._table.setdefault(self._key(gm, node), len(self._table))

    def _key(self, gm: fx.GraphModule, node: fx.Node) -> Hashable:
        if node.op == "placeholder":
            return ("input", node.target)
        if node.op == "get_attr":
            found = get_attr(gm, str(node.target))
            return ("stored", found.data_ptr(), tuple(found.shape), found.stride(), found.dtype)
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: f"node {self.of[n]}")
        return (node.op, node.target, key_of(args))


def changed(gm: fx.GraphModule, file: FileOrigin) -> Change:
    """The parts of the file to rebuild so that it computes what ``gm`` does.  ``gm`` may be restructured."""
    return _Comparison(gm, file).change()


class _Comparison:
    def __init__(self, gm: fx.GraphModule, file: FileOrigin) -> None:
        self.gm, self.before, self.model = gm, file.captured, file.model
        self.same = _Identities()
        self.same.add(file.captured)
        known = len(self.same._table)
        self.same.add(gm)
        self.is_old = {n: self.same.of[n] < known for n in gm.graph.nodes}
        self.by_name = {n.name: n for n in file.captured.graph.nodes}
        self.order = {name: i for i, node in enumerate(self.model.source.nodes) for name in node.output}
        inputs = file.inputs(file.captured.graph)
        stored = {place: name for name, place in self.model.places.items()}
        self.names: dict[int, tuple[str, ...]] = {}
        for node in file.captured.graph.nodes:
            found = names_of(node)
            if node.op == "placeholder":
                found = (inputs[node],)
            elif node.op == "get_attr" and str(node.target) in stored:
                found = (stored[str(node.target)],)
            number = self.same.of[node]
            self.names[number] = (*self.names.get(number, ()), *found)
        self._take_sizes_from_inputs(file.added(gm.graph).values())
        self.made: dict[str, fx.Node] = {}
        self.done: dict[str, fx.Node] = {}
        self.read: dict[fx.Node, str] = {}
        self.weights: dict[fx.Node, None] = {}
        self.unread: list[fx.Node] = []
        self.seen: set[fx.Node] = set()
        self.arranged: set[fx.Node] = set()  # layout operators on the operands of a new attention, written with it

    def _take_sizes_from_inputs(self, added: Collection[fx.Node]) -> None:
        """A size that an input of the file also has is read from the input: its previous source may be unused now."""
        known = {
            size.node.expr: (node, axis)
            for node in reversed(inputs_of(self.gm.graph))
            if node not in added
            for axis, size in enumerate(value(node).shape)
            if not is_static(size)
        }
        for node in self.gm.graph.nodes:
            if is_call(node, aten.sym_size.int) and self.is_old[node] and isinstance(value(node), torch.SymInt):
                node.args = known.get(value(node).node.expr, node.args)

    def change(self) -> Change:
        for wanted in self._outputs():
            self._want(*wanted)
        while self.unread:
            self._look_behind(self.unread.pop())
        self._hoist()
        if clash := [name for node, name in self.read.items() if self.is_old[node] and name in self.made]:
            raise ExportError(f"{clash[0]!r} is needed in both its old and its new version")
        return Change(self.made, self.read, tuple(self.weights))

    def _want(self, name: str, now: fx.Node, before: fx.Node) -> None:
        """The file gets the value of ``now`` under ``name``, instead of that of ``before``."""
        waiting = [(name, now, before)]
        while waiting:
            name, now, before = waiting.pop()
            if self.same.of[now] == self.same.of[before] or self.done.get(name) is now:
                continue
            if name in self.done:
                raise ExportError(f"two rewrites replace {name!r} with different values")
            self.done[name] = now
            inner = self._kept_with_layout(now, before)
            if inner is None:
                self.made[name] = now
                self.unread.append(now)
            else:
                waiting += inner

    def _kept_with_layout(self, now: fx.Node, before: fx.Node) -> list[tuple[str, fx.Node, fx.Node]] | None:
        return None if self._lays_out_what_is_new(now, before) else self._kept(now, before)

    def _look_behind(self, node: fx.Node) -> None:
        """What of the file the new nodes down from ``node`` read."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node in self.seen:
                continue
            self.seen.add(node)
            near = node.all_input_nodes[:1] if node in self.arranged else _arranged_by(node)
            self.arranged |= {n for n in near if n.target in _LAYOUT}
            if (name := self._in_file(node)) is not None:
                self.read[node] = name
                continue
            is_weight = node.op == "get_attr" and not str(node.target).startswith("constant_")
            if is_weight and get_attr(self.gm, str(node.target)).dim() > 0:
                self.weights[node] = None
            stack += node.all_input_nodes

    def _hoist(self) -> None:
        """Common inputs of several new values become separate values, so they are computed once."""
        reached: dict[fx.Node, set[str]] = {}
        for name, node in self.made.items():
            for n in ancestors(node, stop=self.read.__contains__):
                reached.setdefault(n, set()).add(name)
        for node, names in reached.items():
            if len(names) < 2 or not is_tensor(node) or node.op == "get_attr" or node in self.read:
                continue
            if node in self.made.values() or all(reached[u] == names for u in node.users if u in reached):
                continue
            self.made[f"{SHARED}{node.name}"] = node

    def _in_file(self, node: fx.Node) -> str | None:
        """The file's name for the value of ``node``, if the file's own nodes compute it."""
        if not is_tensor(node) or node in self.arranged or _is_a_number_of_sizes(node):
            return None
        if self.is_old[node]:
            names = self.names.get(self.same.of[node])
            return self._first(names) if names else None
        before = self.by_name.get(str(node.meta.get(ORIGIN)))
        names = self._all(before) if before is not None else ()
        if before is None or not names or self._kept_with_layout(node, before) is None:
            return None
        name = self._first(names)
        if self.done.get(name, node) is not node:
            return None
        self._want(name, node, before)
        return name

    def _outputs(self) -> Iterator[tuple[str, fx.Node, fx.Node]]:
        now, before = (_named_outputs(gm) for gm in (self.gm, self.before))
        said = dict(zip(self.model.output_names(), self.model.outputs, strict=True))
        for name, node in now.items():
            yield self._first((said[name], *self._all(before[name]))), node, before[name]

    def _all(self, before: fx.Node) -> tuple[str, ...]:
        return self.names.get(self.same.of[before], ())

    def _first(self, names: tuple[str, ...]) -> str:
        """Of several names for one value, the first computed: the others derive from it."""
        return min(names, key=lambda n: self.order.get(n, -1))

    def _kept(self, now: fx.Node, before: fx.Node) -> list[tuple[str, fx.Node, fx.Node]] | None:
        """The inputs that the file's own node for ``before`` would need; None if it computes something else."""
        found: list[tuple[str, fx.Node, fx.Node]] = []
        stack = [(now, before)]
        while stack:
            n, b = stack.pop()
            if self.same.of[n] == self.same.of[b]:
                continue
            names = self._all(b)
            if (n, b) != (now, before) and names and is_tensor(b):
                found.append((self._first(names), n, b))
                continue
            if not self._corresponds(n, b):
                return None
            stack += zip(n.all_input_nodes, b.all_input_nodes, strict=True)
        return found

    def _lays_out_what_is_new(self, now: fx.Node, before: fx.Node) -> bool:
        """The node only rearranges a rebuilt value, and is rebuilt with it."""
        n, b, moved = now, before, False
        while b.target in _LAYOUT and self._corresponds(n, b):
            n, b, moved = n.all_input_nodes[0], b.all_input_nodes[0], True
        return moved and self.same.of[n] != self.same.of[b] and self._kept(n, b) is None

    def _corresponds(self, now: fx.Node, before: fx.Node) -> bool:
        """``now`` is ``before`` with other inputs, or another node of the file that computed the same."""
        origin = self.by_name.get(str(now.meta.get(ORIGIN)))
        if origin is None or self.same.of[origin] != self.same.of[before] or now.op != before.op:
            return False
        if now.op != "call_function" or now.target != before.target:
            return False
        return len(now.all_input_nodes) == len(before.all_input_nodes) and _shape_of_call(now) == _shape_of_call(before)


def _shape_of_call(node: fx.Node) -> Hashable:
    place = {n: i for i, n in enumerate(node.all_input_nodes)}
    found: Hashable = key_of(fx.node.map_arg((node.args, node.kwargs), lambda n: f"node {place[n]}"))
    return found


def _is_a_number_of_sizes(node: fx.Node) -> bool:
    """Such as a scale from the head size: the tensor that had this size may be unused now."""
    is_one = all(is_static(n) and int(n) == 1 for n in value(node).shape)
    return node.op == "call_function" and is_one and not inputs_behind(node)


def _arranged_by(node: fx.Node) -> list[fx.Node]:
    """The queries, keys and values of an attention, and the inputs of their layout operators."""
    return [operand(node, i) for i in range(3)] if is_attention_call(node) else []


def _named_outputs(gm: fx.GraphModule) -> Mapping[str, fx.Node]:
    spec: Any = gm._out_spec
    leaves = gm.graph.output_node().args[0]
    assert isinstance(leaves, (list, tuple))
    found: dict[str, fx.Node] = pytree.tree_unflatten(list(leaves), spec)
    return found
