"""Removing and replacing heads in a graph: selections are moved to the weights, which become smaller ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from attnopt.base.sizes import is_static
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import RESHAPES, arg, aten, calls, shape, value
from attnopt.graph.ops import PERMUTES, Kind, of
from attnopt.graph.select import Selection, restrict, spread
from attnopt.slicing.pull import pull
from attnopt.slicing.pull_layout import SPLITS
from attnopt.slicing.push import Pushed, push
from attnopt.slicing.scattered import Scattered, scattered
from attnopt.slicing.selection import Pulled, order_of, regroup, trim
from attnopt.slicing.sources import Source, slice_sources
from attnopt.slicing.weight_store import Weights

PIECES = of(Kind.SLICE, Kind.PIECE)


class _DynamicAxisError(Exception):
    """A selection reached an axis that merges heads with a dynamic batch and cannot propagate further: its indices hold at the
    sizes of the example inputs only, so it must be applied below, where heads have a separate axis."""


def with_splits(packed: Iterable[fx.Node]) -> set[fx.Node]:
    """``packed`` tensors, and what returns their parts."""
    made = set(packed)
    return made | {u for n in made for u in n.users if calls(u, SPLITS)}


class Selector:
    """Builds selections of nodes, propagated backward as far as possible.

    ``forks`` are packed projections, which serve several roles: only the needed part is selected.
    Without ``weights``, selections stay after projections and parameters, which are unchanged.
    ``edited`` holds new values of parameters for this site alone; every affected node (``dirty``) is rebuilt
    even if nothing is selected.  ``whole`` nodes are needed anyway: selections stay after them.
    ``anew`` are the nodes whose parts were computed from selections of what they read.
    """

    def __init__(
        self,
        emit: Emitter,
        weights: Weights | None,
        edited: Mapping[str, Tensor] | None = None,
        dirty: Sequence[fx.Node] = (),
        forks: Collection[fx.Node] = (),
        whole: Collection[fx.Node] = (),
    ) -> None:
        self.emit, self.weights, self.edited, self.dirty = emit, weights, dict(edited or {}), set(dirty)
        self.forks, self.whole = forks, whole
        self.anew: set[fx.Node] = set()
        self._sources = with_splits(forks)
        self._known: dict[Any, fx.Node] = {}

    def select(self, node: fx.Node, selection: Selection) -> fx.Node:
        """A node whose value is ``node`` restricted to ``selection``."""
        selection = trim(node, selection)
        if not selection and node not in self.dirty:
            return node
        key = (node, tuple(selection.items()))
        if key not in self._known:
            self._known[key] = self._build(node, selection)
        return self._known[key]

    def _build(self, node: fx.Node, selection: Selection) -> fx.Node:
        if node.op == "get_attr":
            return self._parameter(node, selection)
        if selection and node in self.whole and _is_fixed(node, selection):
            return restrict(self.emit, self.select(node, {}), selection)
        if not selection and calls(node, PIECES) and node.all_input_nodes[0] in self._sources:
            return self._piece(node)
        if not selection:
            table = {n: self.select(n, {}) for n in node.all_input_nodes}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: table[n])
            self.anew.add(node)
            return self.emit.call(node.target, *args, **kwargs)
        pulled = pull(node, selection)
        if pulled is None and (found := scattered(node, selection)) is not None:
            return self._gathered(node, found)
        if pulled is None or (pulled.weights and self.weights is None):
            return self._stay(node, selection)
        if pulled.across and (self.weights is None or not _ends_in_weights(pulled)):
            return self._stay(node, selection)
        try:
            if pulled.exact is not None and pulled.exact[0][0] in self.forks:
                return self.select(*pulled.exact[0])
            made = self._made_from(pulled)
        except _DynamicAxisError:
            return self._stay(node, selection)
        self.anew.add(node)
        return made

    def _piece(self, node: fx.Node) -> fx.Node:
        """One role of a packed projection, computed separately."""
        pulled = pull(node, {})
        if pulled is None:
            return node
        return self.select(*pulled.exact[0]) if pulled.exact is not None else self._made_from(pulled)

    def _gathered(self, node: fx.Node, found: Scattered) -> fx.Node:
        rows = self.select(found.source, {len(shape(found.source)) - 1: found.rows})
        tokens = [self.emit.size(rows, axis) for axis in range(len(shape(rows)) - 1)]
        return self.emit.call(aten.reshape.default, rows, [*tokens, *found.sizes])

    def _made_from(self, pulled: Pulled) -> fx.Node:
        found = [self.select(n, s) for n, s in pulled.demands]
        if pulled.build is None:
            return found[0]
        target, args, kwargs = pulled.build(found)
        made: fx.Node = self.emit.call(target, *args, **kwargs)
        return made

    def _stay(self, node: fx.Node, selection: Selection) -> fx.Node:
        """Propagate the axes that can be, and select the others here."""
        if len(selection) > 1:
            for axis, idx in selection.items():
                if pull(node, {axis: idx}) is not None:
                    rest = {a: i for a, i in selection.items() if a != axis}
                    return restrict(self.emit, self.select(node, {axis: idx}), rest)
        if not _is_fixed(node, selection):
            raise _DynamicAxisError
        return restrict(self.emit, self.select(node, {}), selection)

    def _parameter(self, node: fx.Node, selection: Selection) -> fx.Node:
        if self.weights is None:
            return restrict(self.emit, node, selection)
        name = str(node.target)
        if not selection and name not in self.edited:
            return node
        return self.weights.read(self.emit, self.weights.derive(name, selection, self.edited.get(name)))


def _is_fixed(node: fx.Node, axes: Iterable[int]) -> bool:
    """No input changes the length of these axes, so that places along them mean the same in any call."""
    return all(is_static(value(node).shape[axis]) for axis in axes)


def _ends_in_weights(pulled: Pulled) -> bool:
    """What is selected of a product of activations, as of a bias that queries make, is heads of projections above."""
    ends = [x for n, s in pulled.demands if trim(n, s) for x in slice_sources(n, s, exact=False)]
    of_weights = [x for x in ends if x.kind == "weight" or _is_scattered(x)]
    return bool(of_weights) and all(x.kind == "constant" or x in of_weights for x in ends)


def _is_scattered(x: Source) -> bool:
    return x.kind == "blocked" and scattered(x.node, x.selection) is not None


def push_down(
    graph: fx.Graph, weights: Weights, origin: dict[str, Any], old: fx.Node, new: fx.Node, selection: Selection
) -> None:
    """Let everything that uses ``old`` use ``new``, which lacks the slices outside ``selection`` (they count as zero)."""
    _straighten(old)
    for user in list(old.users):
        emit = Emitter(graph, user, origin)
        pushed = push(user, old, selection)
        if pushed is None or not _arrives(user, pushed):
            user.replace_input_with(old, spread(emit, new, old, selection))
            continue
        select = Selector(emit, weights)
        target, args, kwargs = pushed.build(new, [select.select(n, s) for n, s in pushed.demands])
        below = emit.call(target, *args, **kwargs)
        if pushed.selection is None:
            user.replace_all_uses_with(below)
        else:
            push_down(graph, weights, origin, user, below, pushed.selection)


def _arrives(user: fx.Node, pushed: Pushed) -> bool:
    """Indices along an axis that merges heads with a free batch hold at the example alone: they have to reach one of heads."""
    chosen = pushed.selection
    if chosen is None or _is_fixed(user, chosen):
        return True
    below = [(n, push(n, user, chosen)) for n in user.users]
    return all(found is not None and _arrives(n, found) for n, found in below)


def _straighten(node: fx.Node) -> None:
    """Splitting heads into groups and concatenating them, on the heads directly: groups that lost different
    heads have no shape in between."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if not calls(user, RESHAPES):
            continue
        for below in list(user.users):
            if calls(below, RESHAPES):
                below.replace_input_with(user, node)
                pending.append(below)
            elif calls(below, PERMUTES):
                _permute_first(node, user, below)
        if not user.users:
            user.graph.erase_node(user)


def _permute_first(node: fx.Node, split: fx.Node, permute: fx.Node) -> None:
    """permute(split(node)) as split(permute(node)), if the parts of each axis stay together."""
    groups = regroup(shape(node), shape(split))
    if groups is None or any(len(mine) != 1 for mine, _ in groups):
        return
    if any(_is_fixed(node, mine) != _is_fixed(split, parts) for mine, parts in groups):  # equal in the example alone
        return
    part_of = {part: mine[0] for mine, parts in groups for part in parts}
    order = order_of(permute)
    axes = list(dict.fromkeys(part_of[a] for a in order))
    if order != [part for axis in axes for part, whole in part_of.items() if whole == axis]:
        return
    emit = Emitter(node.graph, permute)
    sizes = arg(split, 1)
    moved = emit.call(aten.permute.default, node, axes)
    permute.replace_all_uses_with(emit.call(aten.reshape.default, moved, [sizes[a] for a in order]))
    node.graph.erase_node(permute)
