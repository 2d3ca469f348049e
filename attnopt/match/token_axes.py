"""Axes of what is computed token by token: which of them an operator keeps, and along which it mixes or tells elements apart.

The axes of a tensor are followed from the features of tokens through projections, norms and layouts.  An operator that mixes
the elements of an axis, or treats them unequally, as a table of positions does, is noted with the atoms of that axis: it acts
token by token only if they are no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx
from torch.fx.node import Target

from attnopt.base.sizes import same_size
from attnopt.graph.axes import Atom, Axes, Axis, follow, fresh, length, resolve, resolve_all
from attnopt.graph.nodes import (
    arg,
    aten,
    calls,
    getitem_source,
    is_call,
    is_number,
    is_tensor,
    operand,
    shape,
    value,
    wrap,
)
from attnopt.graph.ops import Kind, is_pointwise, is_random, named, of, rules
from attnopt.graph.products import product_of


class NotFollowedError(Exception):
    """An operator without a rule, or one that is no function of each token."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass
class TokenAxes:
    """The axes of ``known`` nodes, which grow from those of a source."""

    known: dict[fx.Node, Axes]
    told_apart: list[tuple[fx.Node, Axis]] = field(default_factory=list)

    def add(self, node: fx.Node) -> None:
        """The axes of ``node`` from those of its operands; others are the same in every call.  Raises NotFollowedError."""
        sized = calls(node, _SIZED)
        if is_random(node.target) or (not sized and any(is_number(n) for n in node.all_input_nodes)):
            raise NotFollowedError(node)
        rule = _RULES.get(node.target)
        if rule is None and is_pointwise(node.target):
            rule = _pointwise
        found = None if rule is None else rule(self, node)
        if found is None or (is_tensor(node) and [length(a) for a in found] != [*shape(node)]):
            raise NotFollowedError(node)
        self.known[node] = found

    def at_token(self, atoms: Iterable[Atom]) -> fx.Node | None:
        """The first operator that mixes these atoms, or tells them apart."""
        marked = set(atoms)
        return next((node for node, axis in self.told_apart if marked & set(resolve(axis))), None)

    def mark(self, node: fx.Node, *axes: Axis) -> None:
        self.told_apart += [(node, axis) for axis in axes if axis]

    def of(self, node: fx.Node) -> Axes:
        return resolve_all(self.known[node])


_SIZED = of(Kind.RESHAPE, Kind.EXPAND)


def _only(axes: TokenAxes, node: fx.Node) -> fx.Node | None:
    """The first operand, if it is the only one of the path."""
    own = [n for n in node.all_input_nodes if n in axes.known]
    return own[0] if own and own == [arg(node, 0)] else None


def _layout(axes: TokenAxes, node: fx.Node) -> Axes | None:
    return follow(node, axes.of(operand(node)))


def _expanded(axes: TokenAxes, node: fx.Node) -> Axes:
    """Copies along an axis are elements of it."""
    own, sizes = axes.of(operand(node)), shape(node)
    own = ((),) * (len(sizes) - len(own)) + own
    return tuple(axis or new for axis, new in zip(own, fresh(sizes), strict=True))


def _pointwise(axes: TokenAxes, node: fx.Node) -> Axes | None:
    return _joined(axes, node, [n for n in node.all_input_nodes if is_tensor(n)], len(shape(node)))


def _joined(
    axes: TokenAxes, node: fx.Node, operands: Iterable[fx.Node], ndim: int, skipped: int | None = None
) -> Axes | None:
    """The axes of operands that are broadcast against each other; ``skipped``: without this one."""
    made: list[Axis] = [()] * ndim
    others: list[tuple[int, ...]] = []
    for n in operands:
        if n not in axes.known:
            others.append((1,) * (ndim - len(shape(n))) + shape(n))
            continue
        own = axes.of(n)
        for i, axis in enumerate(own, ndim - len(own)):
            if i == skipped or not axis:
                continue
            if made[i] and resolve(made[i]) != axis:  # of different kinds, such as features and copies of one number
                axes.mark(node, made[i], axis)
            made[i] = made[i] or axis
    for sizes in others:
        for i, size in enumerate(sizes):
            if size == 1 or i == skipped:
                continue
            axes.mark(node, made[i])
            made[i] = made[i] or fresh((size,))[0]
    return tuple(made)


def _linear(axes: TokenAxes, node: fx.Node) -> Axes | None:
    x = _only(axes, node)
    if x is None:
        return None
    *tokens, features = axes.of(x)
    axes.mark(node, features)
    return (*tokens, *fresh(shape(node)[-1:]))


def _product(axes: TokenAxes, node: fx.Node) -> Axes | None:
    """A product with a tensor that is the same in every call."""
    found = product_of(node)
    if found is None or (found.left in axes.known) == (found.right in axes.known):
        return None
    found = found if found.left in axes.known else found.swapped()
    own = axes.of(found.left)
    mine = {atom: own[i] for i, axis in enumerate(resolve_all(found.left_axes)) for atom in axis}
    result = resolve_all(found.axes)
    outside = {atom for axis in resolve_all(found.right_axes) for atom in axis}
    kept = {atom for axis in result for atom in axis} - outside
    axes.mark(node, *(own[i] for i, axis in enumerate(resolve_all(found.left_axes)) if not set(axis) <= kept))
    made = tuple(mine[axis[0]] if axis and axis[0] in mine else fresh((length(axis),))[0] for axis in result)
    if found.addend is not None:
        if found.addend in axes.known:
            return None
        for size, axis in zip(reversed(shape(found.addend)), reversed(made), strict=False):
            axes.mark(node, axis if size != 1 else ())
    return made


def _convolution(axes: TokenAxes, node: fx.Node) -> Axes | None:
    """With kernels of one element, which is a projection."""
    x = _only(axes, node)
    if x is None or any(size != 1 for size in shape(operand(node, 1))[2:]) or shape(node)[2:] != shape(x)[2:]:
        return None
    batch, channels, *places = axes.of(x)
    axes.mark(node, channels)
    return (batch, *fresh(shape(node)[1:2]), *places)


def _norm(axes: TokenAxes, node: fx.Node) -> Axes | None:
    x = _only(axes, node)
    if x is None:
        return None
    own = axes.of(x)
    axes.mark(node, *own[len(own) - len(arg(node, 1)) :])
    return own


_NORMS = named("linalg_vector_norm norm")


def _reduced(axes: TokenAxes, node: fx.Node) -> Axes | None:
    x = _only(axes, node)
    position = 2 if calls(node, _NORMS) else 1
    dims = arg(node, position) if x is not None else None
    if x is None or not isinstance(dims, (list, tuple, int)) or isinstance(dims, bool):
        return None
    own = axes.of(x)
    gone = {wrap(int(d), len(own)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if not gone:
        return None
    axes.mark(node, *(own[i] for i in gone))
    if len(shape(node)) == len(own):
        return tuple(() if i in gone else axis for i, axis in enumerate(own))
    return tuple(axis for i, axis in enumerate(own) if i not in gone)


def _softmax(axes: TokenAxes, node: fx.Node) -> Axes | None:
    own = axes.of(operand(node))
    axes.mark(node, own[wrap(arg(node, 1), len(own))])
    return own


def _select(axes: TokenAxes, node: fx.Node) -> Axes:
    own = axes.of(operand(node))
    at = wrap(arg(node, 1), len(own))
    axes.mark(node, own[at])
    return (*own[:at], *own[at + 1 :])


def takes_all(node: fx.Node) -> bool:
    """A slice of everything, at every length."""
    return arg(node, 4, 1) == 1 and all(map(same_size, value(node).shape, value(operand(node)).shape))


def _slice(axes: TokenAxes, node: fx.Node) -> Axes:
    own = axes.of(operand(node))
    if takes_all(node):
        return own
    return _part(axes, node, own, wrap(arg(node, 1, 0), len(own)))


def _part(axes: TokenAxes, node: fx.Node, own: Axes, at: int) -> Axes:
    """Some elements of one axis, or others in their place."""
    axes.mark(node, own[at])
    return (*own[:at], *fresh((shape(node)[at],)), *own[at + 1 :])


def _split(axes: TokenAxes, node: fx.Node) -> Axes | None:
    """Of the tensor that is split: ``getitem`` has the axes of a part."""
    return axes.of(x) if (x := _only(axes, node)) is not None else None


def _piece(axes: TokenAxes, node: fx.Node) -> Axes | None:
    found = getitem_source(node)
    if found is None or not calls(found[0], of(Kind.SPLIT)):
        return None
    source, own = found[0], axes.of(found[0])
    unbinds = is_call(source, aten.unbind.int)
    at = wrap(arg(source, 1 if unbinds else 2, source.kwargs.get("dim", 0)), len(own))
    if not unbinds:
        return _part(axes, node, own, at)
    axes.mark(node, own[at])
    return (*own[:at], *own[at + 1 :])


def _cat(axes: TokenAxes, node: fx.Node) -> Axes | None:
    parts = [p for p in arg(node, 0) if is_tensor(p)]
    ndim = len(shape(node))
    at = wrap(arg(node, 1, 0), ndim)
    if any(len(shape(p)) != ndim for p in parts):
        return None
    made = _joined(axes, node, parts, ndim, skipped=at)
    axes.mark(node, *(axes.of(p)[at] for p in parts if p in axes.known))
    return None if made is None else (*made[:at], *fresh((shape(node)[at],)), *made[at + 1 :])


def _stack(axes: TokenAxes, node: fx.Node) -> Axes | None:
    ndim = len(shape(node))
    at = wrap(arg(node, 1, 0), ndim)
    made = _joined(axes, node, list(arg(node, 0)), ndim - 1)
    return None if made is None else (*made[:at], *fresh((shape(node)[at],)), *made[at:])


def _repeated(axes: TokenAxes, node: fx.Node) -> Axes | None:
    own, dim = axes.of(operand(node)), arg(node, 2, node.kwargs.get("dim"))
    if not isinstance(arg(node, 1), int) or not isinstance(dim, int):
        return None
    return _part(axes, node, own, wrap(dim, len(own)))


def _index_select(axes: TokenAxes, node: fx.Node) -> Axes | None:
    x = _only(axes, node)
    return None if x is None else _part(axes, node, axes.of(x), wrap(arg(node, 1), len(axes.of(x))))


_RULES: dict[Target, Callable[[TokenAxes, fx.Node], Axes | None]] = rules(
    {
        Kind.RESHAPE: _layout,
        Kind.PERMUTE: _layout,
        Kind.COPY: _layout,
        Kind.CAST: _layout,
        "unsqueeze squeeze": _layout,
        Kind.EXPAND: _expanded,
        "linear": _linear,
        "matmul bmm mm addmm baddbmm einsum": _product,
        Kind.CONVOLUTION: _convolution,
        "layer_norm rms_norm": _norm,
        Kind.REDUCE: _reduced,
        Kind.SOFTMAX: _softmax,
        "select": _select,
        "slice": _slice,
        Kind.SPLIT: _split,
        "getitem": _piece,
        "cat": _cat,
        "stack": _stack,
        "repeat_interleave": _repeated,
        "index_select": _index_select,
    }
)
