"""Axes as products of atoms, as in einops' ``(b h) l d``, traced through any chain of layout operators.

An axis is a tuple of atoms, outermost first; an axis of length 1 is the empty tuple.  An atom that a reshape splits is
split globally, so every tensor that shares it sees the same parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.node import Target

from attnopt.graph.nodes import arg, aten, is_call, is_tensor, operand, shape, wrap
from attnopt.graph.ops import FACTORS, Kind, rules


@dataclass(eq=False)
class Atom:
    """One indivisible axis; ``size`` at the example inputs, or at any if it is ``fixed``."""

    size: int
    name: str = ""
    parts: tuple[Atom, ...] | None = field(default=None)
    fixed: bool = False

    def __repr__(self) -> str:
        return f"{self.name or 'a'}:{self.size}"


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def resolve(axis: Axis) -> Axis:
    """The axis in terms of atoms that were not split."""
    if all(a.parts is None for a in axis):
        return axis
    return tuple(b for a in axis for b in (resolve(a.parts) if a.parts is not None else (a,)))


def resolve_all(axes: Axes) -> Axes:
    return tuple(resolve(a) for a in axes)


def fresh(sizes: tuple[int, ...], names: str = "") -> Axes:
    """New axes of these lengths."""
    return tuple((Atom(s, names[i : i + 1]),) if s != 1 else () for i, s in enumerate(sizes))


def length(axis: Axis) -> int:
    return math.prod(a.size for a in axis)


def reshape(axes: Axes, sizes: tuple[int, ...]) -> Axes | None:
    """Axes of a tensor after a reshape to ``sizes``; None if an axis would be cut unevenly."""
    atoms = [a for axis in resolve_all(axes) for a in axis]
    if math.prod(a.size for a in atoms) != math.prod(sizes):
        return None
    result: list[Axis] = []
    for size in sizes:
        axis: list[Atom] = []
        rest = size
        while rest > 1:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if rest % atom.size == 0:
                axis.append(atom)
                rest //= atom.size
            elif atom.size % rest == 0:
                outer, inner = Atom(rest, atom.name), Atom(atom.size // rest, atom.name)
                atom.parts = (outer, inner)
                axis.append(outer)
                atoms.insert(0, inner)
                rest = 1
            else:
                return None
        result.append(tuple(axis))
    return tuple(result)


def follow(node: fx.Node, axes: Axes) -> Axes | None:
    """Axes of ``node``, a layout operator, from those of its input; None for other operators.

    Casts and operators that keep every element in position count as layout operators.
    """
    rule = FOLLOWED.get(node.target)
    return None if rule is None else rule(node, resolve_all(axes))


def _permuted(node: fx.Node, axes: Axes) -> Axes:
    n = len(axes)
    if is_call(node, aten.permute.default):
        return tuple(axes[wrap(d, n)] for d in _ints(arg(node, 1)))
    if not is_call(node, aten.transpose.int):
        return (*axes[:-2], axes[-1], axes[-2]) if n >= 2 else axes
    order = list(range(n))
    i, j = wrap(arg(node, 1), n), wrap(arg(node, 2), n)
    order[i], order[j] = order[j], order[i]
    return tuple(axes[d] for d in order)


def _unsqueezed(node: fx.Node, axes: Axes) -> Axes:
    at = wrap(arg(node, 1), len(axes) + 1)
    return (*axes[:at], (), *axes[at:])


def _squeezed(node: fx.Node, axes: Axes) -> Axes:
    dims = _named_by_squeeze(node)
    return tuple(a for i, a in enumerate(axes) if not (i in dims and not a))


def _named_by_squeeze(node: fx.Node) -> Collection[int]:
    n = len(shape(operand(node)))
    return range(n) if len(node.args) < 2 else [wrap(d, n) for d in _ints(arg(node, 1))]


def _expanded(node: fx.Node, axes: Axes) -> Axes | None:
    out = shape(node)
    axes = ((),) * (len(out) - len(axes)) + axes
    return axes if all(length(a) == s for a, s in zip(axes, out, strict=True)) else None


def _sliced(node: fx.Node, axes: Axes) -> Axes | None:
    return axes if shape(node) == tuple(length(a) for a in axes) else None


FOLLOWED: dict[Target, Callable[[fx.Node, Axes], Axes | None]] = rules(
    {
        Kind.RESHAPE: lambda node, axes: reshape(axes, shape(node)),
        Kind.COPY: lambda node, axes: axes,
        Kind.CAST: lambda node, axes: axes,
        Kind.PERMUTE: _permuted,
        "unsqueeze": _unsqueezed,
        "squeeze": _squeezed,
        Kind.EXPAND: _expanded,  # of axes that the tensor lacks
        "slice": _sliced,  # that takes all
    }
)
NOT_FOLLOWED = {
    "select": "drops an axis",
    "repeat repeat_interleave": "repeats elements in a way that atoms cannot name",
    "split split_with_sizes chunk unbind tensor_split getitem": "a part of an axis is not an atom",
    "cat stack": "joined axes have no atoms in common",
    "flip roll": "the elements of an atom are counted from its start",
    "constant_pad_nd pad": "the axis has other elements, too",
    "index index_select gather": "the order of the elements is in a tensor",
    "view_as_complex view_as_real": "two numbers become one element",
}


def unfollow(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """(input, its axes) of a layout operator, or a product with a number, whose result has ``axes``; else None."""
    rule = UNFOLLOWED.get(node.target)
    if rule is None or not node.args or not is_tensor(arg(node, 0)):
        return None
    found = rule(node, operand(node), axes)
    return None if found is None else (operand(node), found)


def _before_permute(node: fx.Node, x: fx.Node, axes: Axes) -> Axes:
    trial = fresh(shape(x)) if 1 not in shape(x) else tuple((Atom(s),) for s in shape(x))
    moved = _permuted(node, trial)
    return tuple(axes[moved.index(ax)] for ax in trial)


def _before_unsqueeze(node: fx.Node, x: fx.Node, axes: Axes) -> Axes:
    at = wrap(arg(node, 1), len(axes))
    return (*axes[:at], *axes[at + 1 :])


def _before_squeeze(node: fx.Node, x: fx.Node, axes: Axes) -> Axes:
    kept, dims = iter(axes), _named_by_squeeze(node)
    return tuple(() if i in dims and s == 1 else next(kept) for i, s in enumerate(shape(x)))


def _before_expand(node: fx.Node, x: fx.Node, axes: Axes) -> Axes:
    shift = len(axes) - len(shape(x))
    return tuple(ax if s != 1 else () for s, ax in zip(shape(x), axes[shift:], strict=True))


def _before_factor(node: fx.Node, x: fx.Node, axes: Axes) -> Axes | None:
    return None if is_tensor(arg(node, 1)) else axes


UNFOLLOWED: dict[Target, Callable[[fx.Node, fx.Node, Axes], Axes | None]] = rules(
    {
        Kind.RESHAPE: lambda node, x, axes: reshape(axes, shape(x)),
        Kind.COPY: lambda node, x, axes: axes,
        Kind.CAST: lambda node, x, axes: axes,
        Kind.PERMUTE: _before_permute,
        "unsqueeze": _before_unsqueeze,
        "squeeze": _before_squeeze,
        Kind.EXPAND: _before_expand,
        FACTORS: _before_factor,
    }
)
NOT_UNFOLLOWED = NOT_FOLLOWED | {"slice": "the operand has more elements than the axes say"}


def _ints(x: Any) -> list[int]:
    return [int(i) for i in x] if isinstance(x, (list, tuple)) else [int(x)]


def broadcast(node: fx.Node, frame: Axes) -> Axes | None:
    """Axes of an operand that is broadcast against a tensor with the axes ``frame``."""
    sizes = shape(node)
    frame = resolve_all(frame)
    if len(sizes) > len(frame):
        if any(s != 1 for s in sizes[: len(sizes) - len(frame)]):
            return None
        frame = ((),) * (len(sizes) - len(frame)) + frame
    aligned = frame[len(frame) - len(sizes) :]
    axes: list[Axis] = []
    for size, axis in zip(sizes, aligned, strict=True):
        if size != 1 and size != length(axis):
            return None
        axes.append(axis if size != 1 else ())
    return tuple(axes)
