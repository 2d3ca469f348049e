"""Selections that no single operator rule can propagate, traced head by head through a run of layout changes.

If a projection packs the queries of each group with its keys and values, the remaining heads may differ between groups.
They are not a product of groups and positions, but each is a set of features of the projection, and so is their union.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attnopt.base.sizes import same_size
from attnopt.graph.nodes import calls, shape, value
from attnopt.graph.ops import REARRANGED, Kind, of
from attnopt.graph.select import Selection
from attnopt.slicing.pull import pull
from attnopt.slicing.selection import trim

_SAME_ELEMENTS = REARRANGED | of(Kind.SLICE, Kind.PIECE)  # the dtype, too


@dataclass(frozen=True)
class Scattered:
    """The selection is ``source`` at these ``rows`` of its last axis, which becomes the axes of these ``sizes``."""

    source: fx.Node
    rows: tuple[int, ...]
    sizes: tuple[int, ...]


def scattered(node: fx.Node, selection: Selection) -> Scattered | None:
    """The source of ``node`` at ``selection`` along one axis; None if not only through layout changes of the last axis.

    ``node`` is [*tokens, heads, features] or [*tokens, features], and its source [*tokens, more features].
    """
    sizes = shape(node)
    axis = next(iter(selection))
    if len(selection) != 1 or axis < len(sizes) - 2:
        return None
    first = {axis: (selection[axis][0],)}
    source = next((n for n, chosen in _above(node, first) if _is_source(n, chosen, node, axis)), None)
    if source is None:
        return None
    last, rows = len(shape(source)) - 1, list[int]()
    for i in selection[axis]:
        mine = _at(source, node, {axis: (i,)})
        if mine is None or set(mine) != {last} or len(mine[last]) != math.prod(sizes[axis + 1 :]):
            return None
        for other in range(len(sizes)):  # every axis runs as the source's does
            back = tuple(reversed(range(sizes[other])))
            expected = {last: mine[last][::-1]} if other > axis else {other: back, last: mine[last]}
            if other != axis and _at(source, node, {axis: (i,), other: back}) != trim(source, expected):
                return None
        rows += mine[last]
    return Scattered(source, tuple(rows), (len(selection[axis]), *sizes[axis + 1 :]))


def _above(node: fx.Node, chosen: Selection) -> Iterator[tuple[fx.Node, dict[int, tuple[int, ...]]]]:
    """The tensors in a run of layout changes above ``node``, and the selection on each."""
    chosen = trim(node, chosen)
    while calls(node, _SAME_ELEMENTS) and (pulled := pull(node, chosen)) is not None and len(pulled.demands) == 1:
        node, below = (pulled.exact or pulled.demands)[0]
        chosen = trim(node, below)
        yield node, chosen


def _at(source: fx.Node, node: fx.Node, chosen: Selection) -> dict[int, tuple[int, ...]] | None:
    return next((found for n, found in _above(node, chosen) if n is source), None)


def _is_source(source: fx.Node, chosen: Selection, node: fx.Node, axis: int) -> bool:
    return set(chosen) == {len(shape(source)) - 1} and _same_tokens(node, axis, source)


def _same_tokens(node: fx.Node, axis: int, source: fx.Node) -> bool:
    """The axes before ``axis`` are those before the source's last one."""
    mine, theirs = value(node).shape[:axis], value(source).shape[:-1]
    return len(mine) == len(theirs) and all(same_size(a, b) for a, b in zip(mine, theirs, strict=True))
