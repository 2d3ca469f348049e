"""A part of a graph, computed again and again with other values of the nodes that it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.graph.interpreter import Forward, Schedule
from attnopt.graph.nodes import inputs_of, is_tensor, run_call, shape, value

Values = dict[fx.Node, Any]


class Part:
    """What of ``ends`` depends on ``starts``, without what passes through ``held``, whose values stay as they are given.

    ``nodes``: those to compute, in their order; ``reads``: all other nodes whose values they or the ends are.
    """

    def __init__(
        self, graph: fx.Graph, starts: Sequence[fx.Node], ends: Sequence[fx.Node], held: Collection[fx.Node] = ()
    ) -> None:
        self.starts, self.ends, self.held = tuple(starts), tuple(ends), frozenset(held) - {*starts}
        known = {*starts, *self.held}
        wanted = {*_above(ends, known)}
        moved = {*starts}
        self.nodes: list[fx.Node] = []
        for n in graph.nodes:
            if n in wanted and n not in known and any(i in moved for i in n.all_input_nodes):
                moved.add(n)
                self.nodes.append(n)
        used = [i for n in self.nodes for i in n.all_input_nodes]
        self.reads = [n for n in dict.fromkeys([*used, *ends]) if n not in moved]
        kept = {*ends}
        last = {i: n for n in self.nodes for i in n.all_input_nodes}
        self.dying: dict[fx.Node, list[fx.Node]] = {}
        for i, n in last.items():
            if i in moved and i not in kept:
                self.dying.setdefault(n, []).append(i)

    @property
    def is_reached(self) -> bool:
        """Some end depends on a start."""
        return bool({*self.ends} & {*self.starts, *self.nodes})

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that is computed, at the sizes of the example."""
        sizes = (value(n).itemsize * math.prod(shape(n)) for n in self.nodes if is_tensor(n))
        return max(sizes, default=1)

    def run(self, around: Mapping[fx.Node, Any], given: Sequence[Any]) -> list[Any]:
        """The values of the ends; ``around`` has those of ``reads``, and ``given`` are those of the starts."""
        with torch.no_grad():
            return self.differentiable(around, given)

    def differentiable(self, around: Mapping[fx.Node, Any], given: Sequence[Any]) -> list[Any]:
        """The same, through which derivatives flow from ``given``."""
        values: Values = {n: around[n] for n in self.reads} | dict(zip(self.starts, given, strict=True))
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = run_call(node, args, kwargs)
            for n in self.dying.get(node, ()):
                del values[n]
        return [values[n] for n in self.ends]


class Call(Forward):
    """One call of a graph, which stops at some nodes to compute parts of it anew.  Nothing is written into its state.

    ``ends``: what is read of it at last, and kept until then."""

    def __init__(
        self, gm: fx.GraphModule, inputs: object, stops: Collection[fx.Node], ends: Collection[fx.Node]
    ) -> None:
        leaves = pytree.tree_leaves(inputs)
        schedule = Schedule(gm.graph, {n: (n,) for n in stops} | {gm.graph.output_node(): ends})
        super().__init__(gm, dict(zip(inputs_of(gm.graph), leaves, strict=True)), schedule)

    def read(self, stops: Collection[fx.Node]) -> Values:
        """The values of these stops, which are the next ones, in one go."""
        found: Values = {}
        for node in sorted(stops, key=self.schedule.place.__getitem__):
            self.up_to(node)
            found[node] = self(node)
        return found

    def around(self, part: Part, held: Mapping[fx.Node, Any] = {}) -> Values:
        """What ``part`` reads, where the call has come to; later nodes are computed for it alone.  ``held``: of its own."""
        given = self.values | dict(held)
        known = {n: given[n] if n in given else self.stored(n) for n in part.reads if n in given or n.op == "get_attr"}
        missing = [n for n in part.reads if n not in known]
        if not missing:
            return known
        ahead = Forward(self.gm, given, Schedule(self.gm.graph, {n: (n,) for n in missing}))
        ahead.at = self.at
        for node in ahead.schedule.stops:
            ahead.up_to(node)
            known[node] = ahead(node)
        return known


class Stacker:
    """Runs parts for several values of their starts, some at a time as one batch, if that gives the same.

    The first stack is compared with a run of one of its values; where they differ, or a node cannot be computed for a stack,
    each is run alone from then on.
    """

    def __init__(self, agrees: Callable[[Sequence[Tensor], Sequence[Tensor]], bool]) -> None:
        self.agrees, self.is_able, self.is_checked = agrees, True, False

    def each(
        self, part: Part, around: Mapping[fx.Node, Any], given: Iterable[Sequence[Tensor]], at_once: int
    ) -> Iterator[list[Any]]:
        """The ends of ``part`` for each of ``given``, in their order."""
        chunk: list[Sequence[Tensor]] = []
        for one in given:
            chunk.append(one)
            if len(chunk) >= (at_once if self.is_able else 1):
                yield from self._together(part, around, chunk)
                chunk = []
        yield from self._together(part, around, chunk)

    def _together(self, part: Part, around: Mapping[fx.Node, Any], chunk: Sequence[Sequence[Tensor]]) -> Iterator[Any]:
        if len(chunk) > 1 and self.is_able:
            try:
                with _without_fallback_warnings():
                    made = stacked(part, around, chunk)
            except Exception:  # whatever an operator raises that knows no stack
                made = None
            if made is not None and (self.is_checked or self._is_same(part, around, chunk[-1], made[-1])):
                self.is_checked = True
                yield from made
                return
            self.is_able = False
        for one in chunk:
            yield part.run(around, one)

    def _is_same(self, part: Part, around: Mapping[fx.Node, Any], one: Sequence[Tensor], got: Sequence[Any]) -> bool:
        return self.agrees(_tensors(got), _tensors(part.run(around, one)))


@contextmanager
def _without_fallback_warnings() -> Iterator[None]:
    """torch says on stderr which operators it computes one by one; that is only slower."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def stacked(part: Part, around: Mapping[fx.Node, Any], given: Sequence[Sequence[Tensor]]) -> list[list[Any]]:
    """``part.run`` for each of ``given`` as one batch, for every operator along an axis of its own (``torch.vmap``)."""
    plain: dict[int, Any] = {}

    def run(*starts: Tensor) -> tuple[Tensor, ...]:
        found = part.run(around, starts)
        plain.update({i: x for i, x in enumerate(found) if not isinstance(x, Tensor)})
        return tuple(x for x in found if isinstance(x, Tensor))

    columns = [torch.stack(list(column)) for column in zip(*given, strict=True)]
    batch = torch.vmap(run)(*columns)
    rows: list[list[Any]] = []
    for i in range(len(given)):
        own = iter(x[i] for x in batch)
        rows.append([plain[n] if n in plain else next(own) for n in range(len(part.ends))])
    return rows


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def _above(ends: Sequence[fx.Node], stop: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The ends and their ancestors; of ``stop``, without theirs."""
    seen, stack = {*ends}, [*ends]
    while stack:
        n = stack.pop()
        yield n
        if n not in stop:
            fresh = [i for i in n.all_input_nodes if i not in seen]
            seen.update(fresh)
            stack += fresh
