"""Scatters: tensors assembled piece by piece, as concatenations.

``k = empty(...); k[..., :16] = a; k[..., 16:] = b`` becomes a chain of ``slice_scatter``, each of which
copies a whole tensor to change a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import fx

from attnopt.base.sizes import hint, is_static, same_size
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import ancestors, arg, aten, dtype, is_call, is_tensor, operand, shape, value, wrap

PIECES = 64  # more pieces are left unchanged

Place = tuple[fx.Node, int]  # a tensor, and an index along the axis


def written(emit: Emitter, node: fx.Node) -> fx.Node:
    """``copy(x, source)``: the source, in the form and the type of ``x``."""
    x, source = operand(node), operand(node, 1)
    if dtype(source) != dtype(x):
        source = emit.call(aten._to_copy.default, source, dtype=dtype(x))
    sizes = value(x).shape, value(source).shape
    if len(sizes[0]) != len(sizes[1]) or not all(map(same_size, *sizes)):
        source = emit.call(aten.expand.default, source, [emit.size(x, a) for a in range(len(sizes[0]))])
    return source


def filled(emit: Emitter, node: fx.Node) -> fx.Node | None:
    """``x[..., mask] = number`` as ``masked_fill``; None for indices or accumulation."""
    x, indices, written_in = operand(node), arg(node, 1), operand(node, 2)
    masks = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(masks) != 1 or arg(node, 3, False) or dtype(masks[0][1]) != torch.bool or math.prod(shape(written_in)) != 1:
        return None
    ((axis, mask),) = masks
    for _ in range(len(shape(x)) - axis - len(shape(mask))):
        mask = emit.call(aten.unsqueeze.default, mask, -1)
    if dtype(written_in) != dtype(x):
        written_in = emit.call(aten._to_copy.default, written_in, dtype=dtype(x))
    return emit.call(aten.masked_fill.Tensor, x, mask, emit.call(aten.reshape.default, written_in, []))


def full(emit: Emitter, node: fx.Node, number: float) -> fx.Node | None:
    """One number everywhere, with the shape of ``node``, from sizes alone: its template is not needed."""
    sizes, kind = sizes_of(emit, node), value(node)
    if sizes is None:
        return None
    return emit.call(aten.full.default, sizes, number, dtype=kind.dtype, device=kind.device, pin_memory=False)


def sizes_of(emit: Emitter, node: fx.Node) -> list[int | fx.Node] | None:
    """The sizes of ``node`` as numbers, or computed from the first tensor above it that has them."""
    wanted = list(value(node).shape)
    if all(map(is_static, wanted)):
        return [hint(s) for s in wanted]
    above = set(ancestors(node)) - {node}
    places = [(n, a) for n in node.graph.nodes if n in above and is_tensor(n) for a in range(len(value(n).shape))]
    sizes: list[int | fx.Node] = []
    for size in wanted:
        if is_static(size):
            sizes.append(hint(size))
            continue
        place = next(((n, a) for n, a in places if same_size(value(n).shape[a], size)), None)
        if place is None:
            return None
        sizes.append(emit.size(*place))
    return sizes


def joined(emit: Emitter, node: fx.Node) -> fx.Node | None:
    """The result of a ``slice_scatter`` or ``select_scatter`` as its pieces along the axis, joined."""
    axis = wrap(arg(node, 2, 0), len(shape(node)))
    if is_call(node, aten.select_scatter.default):
        index = wrap(arg(node, 3), shape(node)[axis])
        source = emit.call(aten.unsqueeze.default, operand(node, 1), axis)
        node = emit.call(aten.slice_scatter.default, operand(node), source, axis, index, index + 1)
    places = _places(node, axis)
    if places is None:
        return None
    if (sources := _in_turns(places, axis)) is not None:
        return _interleaved(emit, sources, axis)
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(places), 1) if b != (a[0], a[1] + 1)), len(places)]
    if len(starts) > PIECES:
        return None
    pieces = [_piece(emit, places[a:b], axis) for a, b in pairwise(starts)]
    return pieces[0] if len(pieces) == 1 else emit.call(aten.cat.default, pieces, axis)


def _places(node: fx.Node, axis: int, links: int = PIECES) -> list[Place] | None:
    """The pieces along the axis; None if unknown."""
    ndim = len(shape(node))
    if is_call(node, aten.cat.default) and wrap(arg(node, 1, 0), ndim) == axis:
        parts = [_whole(p, axis) for p in arg(node, 0)]
        return None if None in parts else [place for p in parts for place in p or ()]
    if not is_call(node, aten.slice_scatter.default) or wrap(arg(node, 2, 0), ndim) != axis or links == 0:
        return _whole(node, axis)
    below, source = _places(operand(node), axis, links - 1), operand(node, 1)
    bounds = arg(node, 3), arg(node, 4), arg(node, 5)
    if below is None or dtype(source) != dtype(node) or any(isinstance(b, fx.Node) for b in bounds):
        return None
    for i, place in enumerate(range(len(below))[slice(*bounds)]):
        below[place] = (source, i)
    return below


def _whole(node: fx.Node, axis: int) -> list[Place] | None:
    size = value(node).shape[axis]
    return [(node, i) for i in range(int(size))] if is_static(size) else None


def _piece(emit: Emitter, places: Sequence[Place], axis: int) -> fx.Node:
    node, start = places[0]
    if len(places) == shape(node)[axis]:
        return node
    return emit.call(aten.slice.Tensor, node, axis, start, start + len(places))


def _in_turns(places: Sequence[Place], axis: int) -> list[fx.Node] | None:
    """Interleaves tensors with several entries each: all first entries, then all second ones, and so on."""
    sources = list(dict.fromkeys(source for source, _ in places))
    lengths = {shape(s)[axis] for s in sources}
    if len(sources) == 1 or lengths == {1} or lengths != {len(places) // len(sources)}:
        return None
    return sources if list(places) == [(s, i) for i in range(*lengths) for s in sources] else None


def _interleaved(emit: Emitter, sources: Sequence[fx.Node], axis: int) -> fx.Node:
    """``x[0::n] = a; x[1::n] = b; ...``: the n tensors stacked, and the two axes merged."""
    stacked = emit.call(aten.stack.default, sources, axis + 1)
    sizes = [emit.size(stacked, a) for a in range(len(shape(stacked)))]
    length = shape(stacked)[axis] * len(sources)
    return emit.call(aten.reshape.default, stacked, [*sizes[:axis], length, *sizes[axis + 2 :]])
