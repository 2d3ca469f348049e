"""einops' rearrange as graph nodes: tensors in given axes, with the fewest operators."""

from __future__ import annotations

import math
import operator

from torch import fx

from attnopt.base.sizes import is_static, same_size, symbols_of
from attnopt.graph.axes import Atom, Axes, Axis, follow, resolve_all
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, calls, value
from attnopt.graph.ops import PERMUTES
from attnopt.match.region import Region
from attnopt.match.rejection import rejected


class Arranger:
    """Rearranges tensors to given axes with the fewest operators."""

    def __init__(self, emit: Emitter, region: Region) -> None:
        self.emit = emit
        self.alone: dict[Atom, tuple[fx.Node, int]] = {}
        self.inside: dict[Atom, tuple[fx.Node, int, Axis]] = {}
        self.fixed = set(region.heads)  # of the same size at any inputs
        for node, axes in sorted(region.frames, key=lambda frame: frame[0]):  # an operand is there without its product
            if len(value(node).shape) != len(axes):
                continue
            for i, axis in enumerate(resolve_all(axes)):
                self.fixed.update(a for a in axis if a.fixed or is_static(value(node).shape[i]))
                if len(axis) == 1:
                    self.alone.setdefault(axis[0], (node, i))
                for atom in axis:
                    self.inside.setdefault(atom, (node, i, axis))

    def size(self, atom: Atom) -> int | fx.Node:
        if atom in self.alone:
            node, i = self.alone[atom]
            return self.emit.size(node, i)
        if atom in self.fixed or atom not in self.inside:
            return atom.size
        node, i, axis = self.inside[atom]
        others = [a for a in axis if a is not atom]
        if not self.fixed | self.alone.keys() >= set(others):
            return atom.size
        return self.emit.call(operator.floordiv, self.emit.size(node, i), self._times([self.size(a) for a in others]))

    def _times(self, sizes: list[int | fx.Node]) -> int | fx.Node:
        known = math.prod(s for s in sizes if isinstance(s, int))
        total: int | fx.Node = known
        for s in (s for s in sizes if isinstance(s, fx.Node)):
            total = s if total == 1 else self.emit.call(operator.mul, s, total)
        return total

    def length(self, axis: Axis) -> int | fx.Node:
        return self._times([self.size(a) for a in axis])

    def arrange(self, node: fx.Node, axes: Axes, groups: Axes, expand: bool = False) -> fx.Node:
        """``node`` with one axis for each of ``groups``; atoms that it lacks are repeated if ``expand``, else length 1.

        A group of which only some atoms are there is always completed.
        """
        axes, groups = resolve_all(axes), resolve_all(groups)
        present = [a for ax in axes for a in ax]
        wanted = [tuple(a for a in g if a in present) for g in groups]
        missing = [bool(set(g) - set(w)) and (expand or bool(w)) for g, w in zip(groups, wanted, strict=True)]
        flat = [a for g, w, m in zip(groups, wanted, missing, strict=True) for a in (g if m else w)]
        if set(present) - set(flat):
            raise rejected(
                node, "unreadable-layout", "only axes of the attention", f"{node.name} with an additional axis"
            )
        order = [a for a in flat if a in present]
        blocks = _blocks(axes, order, groups)
        node = self.reshape(node, [self.length(b) for b in blocks])
        positions = sorted(range(len(blocks)), key=lambda i: order.index(blocks[i][0]))
        node = self.permute(node, positions)
        if any(missing):
            ones: list[int | fx.Node] = [self.size(a) if a in present else 1 for a in flat]
            node = self.reshape(node, ones)
            node = self.emit.call(aten.expand.default, node, [self.size(a) for a in flat])
        return self.reshape(node, [self.length(g if m else w) for g, w, m in zip(groups, wanted, missing, strict=True)])

    def permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        """A permutation; none if it inverts the one that created ``node``."""
        if calls(node, PERMUTES):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            trial = tuple((Atom(i + 2),) for i in range(len(order)))
            moved = follow(node, trial)
            if moved is not None and tuple(moved[i] for i in order) == trial:
                return source
        return node if order == sorted(order) else self.emit.call(aten.permute.default, node, order)

    def reshape(self, node: fx.Node, sizes: list[int | fx.Node]) -> fx.Node:
        """A reshape; none if the node, or the input of its reshape, already has that shape."""
        if symbols_of(value(node).shape) - symbols_of(value(s) for s in sizes if isinstance(s, fx.Node)):
            expected = "axes whose lengths follow from those of the inputs"
            found = f"several on one axis of {node.name} that may vary"
            raise rejected(
                node, "unreadable-layout", expected, found, "leave all but one of them out of dynamic_shapes"
            )
        made = self.emit.call(aten.reshape.default, node, sizes)
        base = node
        while True:
            if len(value(base).shape) == len(sizes) and all(map(same_size, value(base).shape, value(made).shape)):
                return base
            if getattr(base, "target", None) is not aten.reshape.default:
                return made
            base = base.args[0]  # type: ignore[assignment]


def _blocks(axes: Axes, order: list[Atom], groups: Axes) -> list[Axis]:
    """Runs of atoms that stay together from the source's axes to the groups, in the source's order."""
    group_of = {a: i for i, g in enumerate(groups) for a in g}
    blocks: list[list[Atom]] = []
    for axis in axes:
        last: Atom | None = None
        for atom in axis:
            joined = (
                last is not None and group_of[last] == group_of[atom] and order.index(atom) == order.index(last) + 1
            )
            if joined:
                blocks[-1].append(atom)
            else:
                blocks.append([atom])
            last = atom
    return [tuple(b) for b in blocks]
