"""Taking indices along axes of a node, and putting them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import (
    aten,
    shape,
)

Selection = Mapping[int, tuple[int, ...]]  # axis -> the selected indices, in order; other axes are complete


def restrict(emit: Emitter, node: fx.Node, selection: Selection) -> fx.Node:
    """``node`` restricted to ``selection`` by slices, or by an index if the indices are not a range."""
    for axis, idx in selection.items():
        steps = {b - a for a, b in pairwise(idx)}
        if not steps or steps == {1}:
            node = emit.call(aten.slice.Tensor, node, axis, idx[0], idx[-1] + 1)
            continue
        pieces = [emit.call(aten.slice.Tensor, node, axis, a, b) for a, b in _runs(idx)]
        node = emit.call(aten.cat.default, pieces, axis)
    return node


def _runs(idx: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i in idx:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def spread(emit: Emitter, node: fx.Node, like: fx.Node, selection: Selection) -> fx.Node:
    """``node`` at ``selection``, and zeros elsewhere, with the shape of ``like``."""
    for axis, idx in selection.items():
        where, pieces = 0, []
        zero = emit.call(aten.mul.Tensor, emit.call(aten.slice.Tensor, node, axis, 0, 1), 0)
        for i in range(shape(like)[axis]):
            if i in idx:
                pieces.append(emit.call(aten.slice.Tensor, node, axis, where, where + 1))
                where += 1
            else:
                pieces.append(zero)
        node = emit.call(aten.cat.default, pieces, axis)
    return node
