"""Pieces that are cut along one axis and joined along another, as ``cat(chunk(x, heads, -1), 0)``: no axis leads through."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import fx

from attnopt.base.sizes import is_static, same_size
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import arg, aten, calls, getitem_source, is_call, is_tensor, operand, shape, value, wrap
from attnopt.graph.ops import Kind, named, of

_CUTS = of(Kind.SPLIT) - named("unbind")  # (x, parts, axis)
_END = 2**62  # a slice that ends behind this takes the rest


def moved(emit: Emitter, node: fx.Node) -> fx.Node | None:
    """A ``cat`` of all pieces of one tensor, in their order, as two reshapes around a permutation; None if it is no such."""
    at, parts = wrap(arg(node, 1, 0), len(shape(node))), arg(node, 0)
    if len(parts) < 2 or not all(_as_large(parts[0], p) for p in parts[1:]):
        return None
    found = _all_of_split(parts) or _all_of_slices(parts)
    if found is None:
        return None
    x, cut = found
    if cut == at:
        return x
    sizes = [emit.size(x, a) for a in range(len(shape(x)))]
    apart = emit.call(aten.reshape.default, x, [*sizes[:cut], len(parts), -1, *sizes[cut + 1 :]])
    order = [a + (a >= cut) for a in range(len(sizes))]
    order.insert(at, cut)  # the number of the piece, outside the axis along which they are joined
    turned = emit.call(aten.permute.default, apart, order)
    kept = [emit.size(turned, a) for a in range(len(order))]
    return emit.call(aten.reshape.default, turned, [*kept[:at], -1, *kept[at + 2 :]])


def _as_large(one: fx.Node, other: fx.Node) -> bool:
    a, b = value(one).shape, value(other).shape
    return len(a) == len(b) and all(map(same_size, a, b))


def _all_of_split(parts: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """(x, axis) if the parts are all results of one split."""
    found = [getitem_source(p) for p in parts]
    sources = {f[0] for f in found if f is not None}
    if None in found or len(sources) != 1:
        return None
    (source,) = sources
    if not calls(source, _CUTS) or [f[1] for f in found if f is not None] != list(range(len(value(source)))):
        return None
    x = operand(source)
    return x, wrap(int(arg(source, 2, source.kwargs.get("dim", 0))), len(shape(x)))


def _all_of_slices(parts: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """(x, axis) if the parts are slices that follow each other, from the first element to the last."""
    if not all(is_call(p, aten.slice.Tensor) and is_tensor(arg(p, 0)) and arg(p, 4, 1) == 1 for p in parts):
        return None
    x, ndim = operand(parts[0]), len(shape(parts[0]))
    axes = {wrap(int(arg(p, 1, 0)), ndim) for p in parts}
    if any(operand(p) is not x for p in parts) or len(axes) != 1:
        return None
    (axis,) = axes
    size = value(x).shape[axis]
    bounds = [(arg(p, 2) or 0, arg(p, 3, _END)) for p in parts]
    if not is_static(size) or not all(isinstance(n, int) and n >= 0 for pair in bounds for n in pair):
        return None
    follow_each_other = all(a[1] == b[0] for a, b in pairwise(bounds))
    return (x, axis) if follow_each_other and bounds[0][0] == 0 and bounds[-1][1] >= int(size) else None
