"""Anchors: every form in which a graph normalises scores over keys.

A softmax may be one operator, ``exp`` of a ``log_softmax``, exponentials divided by their sum, or exponentials whose
sum divides only after the product with the values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attnopt.graph import arg, aten, is_call, shape, value, wrap

SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default)
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)
_MAXIMA = (aten.amax.default, aten.max.dim)


@dataclass(frozen=True)
class Softmax:
    """``weights`` = softmax of ``scores`` over ``axis`` of the scores.

    ``late_sum`` is the sum of the exponentials where it divides after the product with the values; ``weights`` are then
    the bare exponentials.
    """

    scores: fx.Node
    weights: fx.Node
    axis: int
    late_sum: fx.Node | None = None


def normalisers(graph: fx.Graph) -> Iterator[Softmax | fx.Node]:
    """Every normaliser in the order in which it runs: a ``Softmax``, or the node of a fused attention operator."""
    for node in graph.nodes:
        if is_call(node, SDPA):
            yield node
        elif is_call(node, *_SOFTMAX):
            x = arg(node, 0)
            yield Softmax(x, node, wrap(arg(node, 1), len(shape(x))))
        elif is_call(node, aten.exp.default):
            yield from _of_exponential(node)


def _of_exponential(node: fx.Node) -> Iterator[Softmax]:
    x = arg(node, 0)
    if is_call(x, *_LOG_SOFTMAX):
        yield Softmax(arg(x, 0), node, wrap(arg(x, 1), len(shape(x))))
        return
    if is_call(x, aten.sub.Tensor) and is_call(arg(x, 1), aten.logsumexp.default):
        total = arg(x, 1)
        dims = arg(total, 1)
        if arg(total, 0) is arg(x, 0) and len(dims) == 1:
            yield Softmax(arg(x, 0), node, wrap(dims[0], len(shape(node))))
        return
    for total in node.users:
        if not is_call(total, aten.sum.dim_IntList) or arg(total, 0) is not node or len(arg(total, 1)) != 1:
            continue
        axis = wrap(arg(total, 1)[0], len(shape(node)))
        divided = [
            u for u in node.users if is_call(u, aten.div.Tensor) and arg(u, 0) is node and _is_sum(arg(u, 1), total)
        ]
        if divided:
            yield Softmax(x, divided[0], axis)
        else:
            yield Softmax(x, node, axis, late_sum=total)
        return


def _is_sum(node: object, total: fx.Node) -> bool:
    if node is total:
        return True
    return is_call(node, aten.expand.default, aten.unsqueeze.default) and arg(node, 0) is total


def is_maximum_of(node: object, scores: fx.Node, axis: int) -> bool:
    """``node`` is the maximum of ``scores`` over ``axis``, kept as an axis: subtracting it changes no softmax."""
    while is_call(node, aten.detach.default, aten.expand.default):
        node = arg(node, 0)
    if is_call(node, operator.getitem) and arg(node, 1) == 0:
        node = arg(node, 0)
    if not is_call(node, *_MAXIMA) or arg(node, 0) is not scores:
        return False
    dims = arg(node, 1)
    only = dims if isinstance(dims, int) else dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else None
    return isinstance(only, int) and wrap(only, value(scores).dim()) == axis
