"""Selections that no operator's own rule can move, followed head by head through a whole run of layout changes.

In a projection that packs each group's queries with its keys and values, the heads that are left may be others in each group.
They are no product of groups and places, yet each of them is some features of the projection, and so all of them are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from attnopt.graph import opname, same_size, shape, value
from attnopt.selecting import Selection, trim
from attnopt.selection import pull

_LAYOUT = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "unsqueeze", "squeeze", "select", "slice", "getitem",
    "clone", "contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class Scattered:
    """The selection is ``source`` at these ``rows`` of its last axis, which becomes the axes of these ``sizes``."""

    source: fx.Node
    rows: tuple[int, ...]
    sizes: tuple[int, ...]


def scattered(node: fx.Node, selection: Selection) -> Scattered | None:
    """Where ``node`` at ``selection``, which is along one axis, comes from; None: not by layout changes of a last axis alone.

    ``node`` is [*tokens, heads, features] or [*tokens, features], and what it comes from [*tokens, more features].
    """
    sizes = shape(node)
    axis = next(iter(selection))
    if len(selection) != 1 or axis < len(sizes) - 2:
        return None
    found = [_below(node, {axis: (i,)}) for i in selection[axis]]
    sources = {source for source, _ in found}
    if len(sources) != 1 or (source := sources.pop()) is node or not _same_tokens(node, axis, source):
        return None
    last = len(shape(source)) - 1
    for i, (_, chosen) in zip(selection[axis], found, strict=True):
        if set(chosen) != {last} or len(chosen[last]) != math.prod(sizes[axis + 1 :]):
            return None
        for other in range(len(sizes)):  # every axis runs as the source's does
            back = tuple(reversed(range(sizes[other])))
            rows = chosen[last][::-1] if other > axis else chosen[last]
            expected = trim(source, {other: back, last: rows} if other < axis else {last: rows})
            if other != axis and _below(node, {axis: (i,), other: back}) != (source, expected):
                return None
    rows = tuple(row for _, chosen in found for row in chosen[last])
    return Scattered(source, rows, (len(found), *sizes[axis + 1 :]))


def _below(node: fx.Node, chosen: Selection) -> tuple[fx.Node, dict[int, tuple[int, ...]]]:
    """The last tensor that a run of layout changes above ``node`` starts from, and the selection there."""
    chosen = trim(node, chosen)
    while opname(node) in _LAYOUT and (pulled := pull(node, chosen)) is not None and len(pulled.demands) == 1:
        node, below = (pulled.exact or pulled.demands)[0]
        chosen = trim(node, below)
    return node, chosen


def _same_tokens(node: fx.Node, axis: int, source: fx.Node) -> bool:
    """The axes before ``axis`` are those before the source's last one."""
    mine, theirs = value(node).shape[:axis], value(source).shape[:-1]
    return len(mine) == len(theirs) and all(same_size(a, b) for a, b in zip(mine, theirs, strict=True))
