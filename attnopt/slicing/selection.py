"""Selections: some indices of some axes of a tensor, and the types for propagating one past an operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.base.sizes import is_static
from attnopt.graph.nodes import RESHAPES, arg, aten, calls, is_call, is_state, operand, shape, value, wrap
from attnopt.graph.ops import REARRANGED, Kind, of
from attnopt.graph.select import Selection

Demand = tuple[fx.Node, Selection]


@dataclass(frozen=True)
class Pulled:
    """``select(node)`` equals ``target(*args, **kwargs)`` built by ``build`` from the demanded selections, in order.

    ``weights``: the demands on weights of a projection rather than on its data;
    ``across``: the selection is along the tokens or batch of a projection.  ``exact`` are the same demands
    without what a later slice would drop, if different.
    """

    demands: tuple[Demand, ...]
    build: Callable[[Sequence[fx.Node]], tuple[Any, tuple[Any, ...], dict[str, Any]]] | None  # None: the demand itself
    weights: frozenset[int] = frozenset()
    across: bool = False
    exact: tuple[Demand, ...] | None = None


def trim(node: fx.Node, selection: Selection) -> dict[int, tuple[int, ...]]:
    """The selection without the axes that it keeps whole."""
    if not selection:
        return {}
    sizes = shape(node)
    return {a: idx for a, idx in sorted(selection.items()) if len(idx) != sizes[a] or idx != tuple(range(sizes[a]))}


def replaced(node: fx.Node, originals: Sequence[fx.Node]) -> Callable[[Sequence[fx.Node]], Any]:
    """A builder that calls the same operator with each of ``originals`` replaced by its selection."""

    def build(found: Sequence[fx.Node]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        table = dict(zip(originals, found, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: table.get(n, n))
        return node.target, args, kwargs

    return build


def with_args(node: fx.Node, *args: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return node.target, args, dict(node.kwargs)


def aligned(operand: fx.Node, ndim: int, selection: Selection) -> dict[int, tuple[int, ...]]:
    """The selection on an operand that was broadcast to ``ndim`` axes."""
    sizes = shape(operand)
    shift = ndim - len(sizes)
    return {a - shift: idx for a, idx in selection.items() if a >= shift and sizes[a - shift] != 1}


def regroup(outer: Sequence[int], inner: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Axes of two shapes of equal size, in the smallest groups whose products agree."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(outer) or j < len(inner):
        a, b = [i] if i < len(outer) else [], [j] if j < len(inner) else []
        pa = outer[i] if a else 1
        pb = inner[j] if b else 1
        i, j = i + len(a), j + len(b)
        while pa != pb:
            if pa < pb and i < len(outer):
                pa, a, i = pa * outer[i], [*a, i], i + 1
            elif pb < pa and j < len(inner):
                pb, b, j = pb * inner[j], [*b, j], j + 1
            else:
                return None
        groups.append((a, b))
    return groups


def unravel(
    sizes: Sequence[int], chosen: Mapping[int, Sequence[int]], target: Sequence[int]
) -> list[tuple[int, ...]] | None:
    """Indices along each axis of ``target`` that correspond to a choice along the axes of ``sizes``, both in C order.

    None unless the choice is a product of choices along the target's axes, in the same order.
    """
    flat = [0]
    for axis, size in enumerate(sizes):
        keep = chosen.get(axis, range(size))
        flat = [f * size + k for f in flat for k in keep]
    if len(target) == 1:
        return [tuple(flat)]
    per_axis: list[tuple[int, ...]] = []
    rest = math.prod(target)
    for size in target:
        rest //= size
        per_axis.append(tuple(dict.fromkeys(f // rest % size for f in flat)))
    again = [0]
    for size, keep in zip(target, per_axis, strict=True):
        again = [f * size + k for f in again for k in keep]
    return per_axis if again == flat else None


_LAYOUT_OF_A_WEIGHT = REARRANGED | of(Kind.CAST)


def is_weight(node: fx.Node) -> bool:
    """``node`` is a parameter or buffer, or a layout change of one."""
    return weight_behind(node) is not None


def weight_behind(node: fx.Node) -> fx.Node | None:
    """The parameter or buffer that ``node`` is, or is a layout change of."""
    while calls(node, _LAYOUT_OF_A_WEIGHT):
        node = arg(node, 0)
    return node if node.op == "get_attr" and not is_state(node) else None


def order_of(node: fx.Node) -> list[int]:
    """The permutation that a permute or transpose applies to the axes of its input."""
    n = len(shape(node))
    order = list(range(n))
    if is_call(node, aten.permute.default):
        return [wrap(int(d), n) for d in arg(node, 1)]
    if is_call(node, aten.transpose.int):
        i, j = wrap(arg(node, 1), n), wrap(arg(node, 2), n)
        order[i], order[j] = order[j], order[i]
    elif n >= 2:
        order[-2], order[-1] = order[-1], order[-2]
    return order


def kept_by_squeeze(node: fx.Node) -> list[int] | None:
    """The input axes that a squeeze of named axes keeps; None if it names none."""
    if len(node.args) < 2:
        return None
    sizes = shape(operand(node))
    dims = arg(node, 1) if isinstance(arg(node, 1), (list, tuple)) else [arg(node, 1)]
    gone = {wrap(int(d), len(sizes)) for d in dims if sizes[wrap(int(d), len(sizes))] == 1}
    return [a for a in range(len(sizes)) if a not in gone]


def resized(node: fx.Node, selection: Selection) -> list[Any]:
    """The size argument of a reshape or expand whose result is selected.

    An axis that joins heads with a dynamic batch is left to the reshape: the number of selected elements is only right at
    the sizes of the example inputs.
    """
    sizes = list(arg(node, 1))
    for axis in range(len(sizes)):
        if axis in selection:
            joined = calls(node, RESHAPES) and not is_static(value(node).shape[axis])
            sizes[axis] = -1 if joined else len(selection[axis])
        elif sizes[axis] == -1 and is_static(value(node).shape[axis]):
            sizes[axis] = shape(node)[axis]
    return sizes


def reshaped(
    node: fx.Node, selection: Selection, groups: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Callable[[fx.Node], tuple[Any, tuple[Any, ...], dict[str, Any]]] | None:
    """How to call the reshape ``node``, whose result is selected, on what it then reads; None if its sizes cannot be said.

    ``groups``: the axes that are read, and those that they become.
    """
    sizes = resized(node, selection)
    if sizes.count(-1) < 2:
        return lambda x: with_args(node, x, sizes)
    joined = [read for read, made in groups if len(made) == 1 and len(read) > 1]
    if len(joined) != 1 or any(len(made) != 1 for _, made in groups):
        return None
    first, last = joined[0][0], joined[0][-1]
    return lambda x: (aten.flatten.using_ints, (x, first, last), {})
