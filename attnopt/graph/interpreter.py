"""The one interpreter of graphs: real values of nodes, computed on demand or in the graph's order.

What uses it differs in two hooks: ``leaf``, where a value is given in place of computing one, and ``call``, how an operator
is called.  Two evaluations are of another kind and stand apart: ``entries`` computes single entries of tensors that are too
large to exist, and ``match/mask_numbers`` reasons about all sizes at once, without values.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.graph.nodes import ancestors, run_call

COMPUTED = object()  # what ``leaf`` returns for a node whose operator is to be called


class Interpreter:
    """Values of nodes, each computed once, when first asked for.  ``values``: those known; a caller may add and remove some."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[fx.Node, Any] | None = None) -> None:
        self.gm, self.values = gm, dict(values or {})

    def leaf(self, node: fx.Node) -> object:
        """The value of ``node`` if it is given, or COMPUTED.  Here: what the module stores."""
        if node.op == "get_attr":
            return self.stored(node)
        if node.op == "call_function":
            return COMPUTED
        raise ValueError(f"depends on the input {node.name}")

    def call(self, node: fx.Node, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """What the operator of ``node`` gives for these values."""
        return run_call(node, args, kwargs)

    def stored(self, node: fx.Node) -> object:
        """A tensor, or the submodule that a higher-order operator calls."""
        found = operator.attrgetter(str(node.target))(self.gm)
        return found.detach() if isinstance(found, Tensor) else found

    def __call__(self, target: fx.Node) -> Any:
        values, stack = self.values, [target]
        with torch.no_grad():
            while stack:
                node = stack[-1]
                if node in values:
                    stack.pop()
                elif (given := self.leaf(node)) is not COMPUTED:
                    values[node] = given
                elif waiting := [n for n in node.all_input_nodes if n not in values]:
                    stack += waiting
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = self.call(node, args, kwargs)
        return values[target]


class Schedule:
    """Which values a run needs to reach some nodes, its stops, and which of them each place of the graph uses last.

    ``read``: for each stop, the nodes whose values are wanted there, before the stop itself is computed.
    """

    def __init__(self, graph: fx.Graph, read: Mapping[fx.Node, Collection[fx.Node]]) -> None:
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.stops = sorted(read, key=self.place.__getitem__)
        self.last_use: dict[fx.Node, int] = {}
        for stop, wanted in read.items():
            self._use(wanted, self.place[stop])
        for node in {n for wanted in read.values() for w in wanted for n in ancestors(w)}:
            self._use(node.all_input_nodes, self.place[node])
        self.dying: dict[int, list[fx.Node]] = {}
        for n, last in self.last_use.items():
            self.dying.setdefault(last, []).append(n)

    def _use(self, nodes: Collection[fx.Node], place: int) -> None:
        for n in nodes:
            self.last_use[n] = max(self.last_use.get(n, 0), place)


class Forward(Interpreter):
    """Runs from stop to stop of a schedule.  It keeps only what something later reads: the memory is that of one layer."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[fx.Node, object], schedule: Schedule) -> None:
        super().__init__(gm, values)
        self.schedule, self.at = schedule, 0

    def up_to(self, stop: fx.Node) -> None:
        """Compute what ``stop`` or a later stop reads of everything before it."""
        schedule, end = self.schedule, self.schedule.place[stop]
        for place in range(self.at, end):
            if schedule.nodes[place] in schedule.last_use:
                self(schedule.nodes[place])
            for n in schedule.dying.get(place, ()):
                self.values.pop(n, None)
        self.at = end
