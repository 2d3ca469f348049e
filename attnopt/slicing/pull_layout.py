"""Selections moved up through operators that only rearrange elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from attnopt.base.sizes import is_static
from attnopt.graph.nodes import arg, aten, calls, getitem_source, is_call, is_tensor, operand, shape, value, wrap
from attnopt.graph.ops import Kind, of, rules
from attnopt.graph.select import Selection
from attnopt.slicing.selection import (
    Demand,
    Pulled,
    aligned,
    kept_by_squeeze,
    order_of,
    regroup,
    replaced,
    reshaped,
    resized,
    trim,
    unravel,
    with_args,
)

SPLITS = of(Kind.SPLIT)


def _reshape(node: fx.Node, selection: Selection) -> Pulled | None:
    x = operand(node)
    groups = regroup(shape(node), shape(x))
    if groups is None:
        return None
    out, source = shape(node), shape(x)
    below: dict[int, tuple[int, ...]] = {}
    for mine, theirs in groups:
        chosen = {mine.index(a): idx for a, idx in selection.items() if a in mine}
        if not chosen:
            continue
        found = unravel([out[a] for a in mine], chosen, [source[a] for a in theirs])
        if found is None:
            return None
        below.update(zip(theirs, found, strict=True))
    made = reshaped(node, selection, [(theirs, mine) for mine, theirs in groups])
    return None if made is None else Pulled(((x, trim(x, below)),), lambda f: made(f[0]))


def _permute(node: fx.Node, selection: Selection) -> Pulled:
    x, order = operand(node), order_of(node)
    return Pulled(((x, {order[a]: idx for a, idx in selection.items()}),), replaced(node, [x]))


def _unsqueeze(node: fx.Node, selection: Selection) -> Pulled:
    x, dim = operand(node), arg(node, 1)
    at = wrap(dim, len(shape(x)) + 1)
    below = {a - (a > at): idx for a, idx in selection.items() if a != at}
    return Pulled(((x, below),), replaced(node, [x]))


def _squeeze(node: fx.Node, selection: Selection) -> Pulled | None:
    x, left = operand(node), kept_by_squeeze(node)
    if left is None:
        return None
    return Pulled(((x, {left[a]: idx for a, idx in selection.items()}),), replaced(node, [x]))


def _expand(node: fx.Node, selection: Selection) -> Pulled:
    x = operand(node)
    below = aligned(x, len(shape(node)), selection)
    return Pulled(((x, below),), lambda f: with_args(node, f[0], resized(node, selection)))


def _select(node: fx.Node, selection: Selection) -> Pulled:
    x, dim, index = arg(node, 0), arg(node, 1), arg(node, 2)
    at = wrap(int(dim), len(shape(x)))
    below: dict[int, tuple[int, ...]] = {a + (a >= at): idx for a, idx in selection.items()}
    if not is_static(value(x).shape[at]):
        return Pulled(((x, below),), replaced(node, [x]))
    below[at] = (wrap(index, shape(x)[at]),)
    return Pulled(((x, below),), lambda f: (aten.squeeze.dim, (f[0], at), {}))


def _slice(node: fx.Node, selection: Selection) -> Pulled:
    x = operand(node)
    at, taken = wrap(arg(node, 1, 0), len(shape(x))), _taken(node)
    if at not in selection:
        exact = ((x, {**selection, at: tuple(taken)}),) if is_static(value(x).shape[at]) else None
        return Pulled(((x, selection),), replaced(node, [x]), exact=exact)
    return Pulled(((x, {**selection, at: tuple(taken[i] for i in selection[at])}),), None)


def _taken(node: fx.Node) -> range:
    """The indices along its axis that a slice selects."""
    x, start, end, step = operand(node), arg(node, 2, 0), arg(node, 3, 2**63 - 1), arg(node, 4, 1)
    return range(shape(x)[wrap(arg(node, 1, 0), len(shape(x)))])[slice(_bound(start), _bound(end), _bound(step))]


def _bound(x: Any) -> int | None:
    if isinstance(x, fx.Node):
        val = value(x)
        return int(val.node.hint) if hasattr(val, "node") else int(val)
    return None if x is None else int(x)


def _getitem(node: fx.Node, selection: Selection) -> Pulled | None:
    """One piece of a split, chunk or unbind."""
    found = getitem_source(node)
    if found is None:
        return None
    source, index = found
    x = arg(source, 0)
    if not is_tensor(x) or not calls(source, SPLITS):
        return None
    unbinds = is_call(source, aten.unbind.int)
    at = wrap(arg(source, 1 if unbinds else 2, source.kwargs.get("dim", 0)), len(shape(x)))
    if unbinds:
        below = {a + (a >= at): idx for a, idx in selection.items()}
        below[at] = (index,)
        return Pulled(((x, below),), lambda f: (aten.squeeze.dim, (f[0], at), {}))
    pieces = value(source)
    start = sum(int(p.shape[at]) for p in pieces[:index])
    size = int(value(node).shape[at])
    if at in selection:
        return Pulled(((x, {**selection, at: tuple(start + i for i in selection[at])}),), None)
    piece = tuple(range(start, start + size))
    return Pulled(
        ((x, selection),),
        lambda f: (aten.slice.Tensor, (f[0], at, start, start + size), {}),
        exact=((x, {**selection, at: piece}),),
    )


def _cat(node: fx.Node, selection: Selection) -> Pulled | None:
    n = len(shape(node))
    parts = [p for p in arg(node, 0) if len(shape(p)) == n]  # torch accepts empty 1-D ones
    at = wrap(arg(node, 1, 0), n)
    others = {a: idx for a, idx in selection.items() if a != at}
    if at not in selection:
        return Pulled(tuple((p, others) for p in parts), lambda f: (node.target, (list(f), at), {}))
    if (one := _slices_of_one(parts, at)) is not None:
        x, places = one
        return Pulled(((x, {**others, at: tuple(places[i] for i in selection[at])}),), None)
    demands: list[Demand] = []
    wanted, start = list(selection[at]), 0
    for part in parts:
        size = shape(part)[at]
        mine = tuple(i - start for i in wanted if start <= i < start + size)
        if mine:
            demands.append((part, {**others, at: mine}))
        start += size
    if wanted != sorted(wanted) or not demands:
        return None
    if len(demands) == 1:
        return Pulled(tuple(demands), None)
    return Pulled(tuple(demands), lambda f: (node.target, (list(f), at), {}))


def _slices_of_one(parts: Sequence[fx.Node], axis: int) -> tuple[fx.Node, list[int]] | None:
    """(the tensor, its indices) if all parts are slices of one tensor along the axis: a selection of its heads."""
    places: list[int] = []
    for p in parts:
        if (
            not is_call(p, aten.slice.Tensor)
            or operand(p) is not operand(parts[0])
            or wrap(arg(p, 1, 0), len(shape(p))) != axis
        ):
            return None
        places += _taken(p)
    return operand(parts[0]), places


def _stack(node: fx.Node, selection: Selection) -> Pulled | None:
    parts = list(arg(node, 0))
    at = wrap(arg(node, 1, 0), len(shape(node)))
    below = {a - (a > at): idx for a, idx in selection.items() if a != at}
    kept = [parts[i] for i in selection.get(at, range(len(parts)))]
    return Pulled(tuple((p, below) for p in kept), lambda f: (node.target, (list(f), at), {}))


def _repeat_interleave(node: fx.Node, selection: Selection) -> Pulled | None:
    x, times = arg(node, 0), arg(node, 1)
    dim = arg(node, 2, node.kwargs.get("dim"))
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    at = wrap(dim, len(shape(x)))
    if at not in selection:
        return Pulled(((x, selection),), replaced(node, [x]))
    return Pulled(((x, {**selection, at: tuple(i // times for i in selection[at])}),), None)


def _repeat(node: fx.Node, selection: Selection) -> Pulled | None:
    x, times = arg(node, 0), arg(node, 1)
    shift = len(times) - len(shape(x))
    for a, idx in selection.items():
        is_one = (a < shift or shape(x)[a - shift] == 1) and tuple(idx) == (0,)
        if not isinstance(times[a], int) and not is_one:
            return None  # the selection is that of the example's count alone
    below: dict[int, tuple[int, ...]] = {}
    again = list(times)
    for a, idx in selection.items():
        if a >= shift:
            below[a - shift] = tuple(i % shape(x)[a - shift] for i in idx)
        again[a] = 1 if a >= shift else len(idx)
    if all(t == 1 for t in again) and shift == 0:
        return Pulled(((x, trim(x, below)),), None)
    return Pulled(((x, trim(x, below)),), lambda f: (node.target, (f[0], again), {}))


def _index_select(node: fx.Node, selection: Selection) -> Pulled | None:
    return None if wrap(arg(node, 1), len(shape(node))) in selection else _elementwise_first(node, selection)


def _elementwise_first(node: fx.Node, selection: Selection) -> Pulled:
    x = operand(node)
    return Pulled(((x, selection),), replaced(node, [x]))


def _complex_view(node: fx.Node, selection: Selection) -> Pulled | None:
    x = operand(node)
    return (
        None
        if len(shape(node)) - 1 in selection and len(shape(node)) > len(shape(x))
        else _elementwise_first(node, selection)
    )


def _roll(node: fx.Node, selection: Selection) -> Pulled | None:
    dims = arg(node, 2, ())
    n = len(shape(node))
    moved = {wrap(int(d), n) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return None if not moved or moved & set(selection) else _elementwise_first(node, selection)


def _flip(node: fx.Node, selection: Selection) -> Pulled | None:
    n = len(shape(node))
    return None if {wrap(int(d), n) for d in arg(node, 1)} & set(selection) else _elementwise_first(node, selection)


def _pad(node: fx.Node, selection: Selection) -> Pulled | None:
    pads, n = list(arg(node, 1)), len(shape(node))
    padded = {n - 1 - i // 2 for i, p in enumerate(pads) if p != 0}
    return None if padded & set(selection) else _elementwise_first(node, selection)


LAYOUT: dict[Any, Callable[[fx.Node, Selection], Pulled | None]] = rules(
    {
        Kind.RESHAPE: _reshape,
        Kind.PERMUTE: _permute,
        "unsqueeze": _unsqueeze,
        "squeeze": _squeeze,
        Kind.COPY: _elementwise_first,
        Kind.CAST: _elementwise_first,
        Kind.EXPAND: _expand,
        "select": _select,
        "slice": _slice,
        "getitem": _getitem,
        "cat": _cat,
        "stack": _stack,
        "repeat_interleave": _repeat_interleave,
        "repeat": _repeat,
        "index_select": _index_select,
        Kind.PAIRS: _complex_view,
        "roll": _roll,
        "flip": _flip,
        Kind.PAD: _pad,
    }
)
NOT_PULLED = {
    "split split_with_sizes chunk unbind tensor_split": "several tensors: getitem has the rule",
    "index gather": "which elements are read is known only at run time",
}
