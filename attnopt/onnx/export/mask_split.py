"""Masks of an exported attention: parts covered by a known pattern are dropped, minimum values are raised."""

from __future__ import annotations

import math

import torch
from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.evaluate import inputs_behind, is_plain
from attnopt.graph.nodes import NOT, arg, aten, dtype, is_call, operand, shape
from attnopt.match.mask_patterns import samples
from attnopt.match.masks import FLOOR
from attnopt.patterns import Pattern

_AND = (aten.bitwise_and.Tensor, aten.logical_and.default)


def soft_floor(emit: Emitter, bias: fx.Node) -> fx.Node:
    """The bias clamped at -1e30, with -inf unchanged.

    ONNX Runtime's Attention takes the dtype's minimum for "hidden" and gives zeros to a query without other keys, where
    torch gives the mean of all values.  -1e30 hides just as well and has the same meaning in both.
    """
    if torch.finfo(dtype(bias)).min > FLOOR:
        return bias
    floored = emit.call(aten.clamp.default, bias, FLOOR)
    return emit.call(aten.where.self, emit.call(aten.isinf.default, bias), bias, floored)


def without_pattern(
    emit: Emitter, bias: fx.Node | None, mask: fx.Node | None, pattern: Pattern, heads: int
) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """Bias and mask without the parts that hide only what ``pattern`` hides, and whether together they hid all of it.

    Otherwise, they are unchanged.
    """
    hidden = mask
    if bias is not None and is_call(bias, aten.masked_fill.Scalar) and arg(bias, 2) == -math.inf:
        hides = arg(bias, 1)
        if is_call(hides, *NOT):
            bias, hidden = operand(bias), operand(hides)
    if hidden is None:
        return bias, mask, False
    rest, found = _split(emit, hidden, _Known(emit.graph, pattern, heads))
    return (bias, rest, True) if found else (bias, hidden, False)


class _Known:
    """Compares masks that depend on no input with a pattern, at the example's sizes and at others."""

    def __init__(self, graph: fx.Graph, pattern: Pattern, heads: int) -> None:
        self.graph, self.pattern, self.heads = graph, pattern, heads

    def compare(self, node: fx.Node) -> tuple[bool, bool]:
        """(hides nothing that the pattern shows, and hides all that the pattern hides)."""
        gm = self.graph.owning_module
        if gm is None or inputs_behind(node) or not is_plain(node):
            return False, False
        seen = samples(gm, [node]) if len(shape(node)) >= 2 else None
        if seen is None:
            return False, False
        pairs = [(s.values[0], s.of(self.pattern, self.heads)) for s in seen]
        return all(bool((m | ~p).all()) for m, p in pairs), all(bool((m == p).all()) for m, p in pairs)


def _split(emit: Emitter, mask: fx.Node, known: _Known) -> tuple[fx.Node | None, bool]:
    """The rest of ``mask`` without the pattern, and whether the whole pattern was in it."""
    shows, equals = known.compare(mask)
    if equals:
        return None, True
    if not is_call(mask, *_AND):
        return (None, False) if shows else (mask, False)
    a, b = mask.all_input_nodes if len(mask.all_input_nodes) == 2 else (mask, mask)
    if a is b:
        return mask, False
    (left, in_left), (right, in_right) = _split(emit, a, known), _split(emit, b, known)
    if not (in_left or in_right):
        return mask, False
    if left is None or right is None:
        return (left if right is None else right), True
    return emit.call(aten.bitwise_and.Tensor, left, right), True
