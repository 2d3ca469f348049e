"""Anchors: every form in which a graph normalises scores over keys.

A softmax may be one operator, ``exp`` of a ``log_softmax``, exponentials divided by their sum, or exponentials whose
sum divides only after the product with the values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.graph import arg, aten, dtype, is_call, operand, shape, value, wrap
from attnopt.overwriting import zeros_of

SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default)
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)
_MAXIMA = (aten.amax.default, aten.max.dim)


@dataclass(frozen=True)
class Softmax:
    """``weights`` = softmax of ``scores`` over ``axis`` of the scores.

    ``late_sum`` is the sum of the exponentials where it divides after the product with the values; ``weights`` are then
    the bare exponentials.  ``masked``: the exponentials, and what they are before they are summed, where that is not the same.
    """

    scores: fx.Node
    weights: fx.Node
    axis: int
    late_sum: fx.Node | None = None
    masked: tuple[fx.Node, fx.Node] | None = None

    @property
    def may_overflow(self) -> bool:
        """Exponentials of scores as they are: what is not a number among the weights need not be a row without a key."""
        written_out = self.late_sum is not None or is_call(self.weights, aten.div.Tensor)
        return written_out and not _is_shifted(self.scores, self.axis)


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
    for kept in (node, *(u for u in node.users if is_call(u, aten.mul.Tensor) or zeros_of(u, node) is not None)):
        for total in kept.users:
            if not is_call(total, aten.sum.dim_IntList) or arg(total, 0) is not kept or len(arg(total, 1)) != 1:
                continue
            axis = wrap(arg(total, 1)[0], len(shape(node)))
            masked = None if kept is node else (node, kept)
            slack = 0.0 if masked else _slack(x, axis)
            divided = [u for u in kept.users if is_call(u, aten.div.Tensor) and arg(u, 0) is kept]
            weights = next((u for u in divided if _is_sum(arg(u, 1), total, slack)), None)
            yield Softmax(x, weights or kept, axis, None if weights else total, masked)
            return


def _slack(x: fx.Node, axis: int) -> float:
    """What may be added to the sum of the exponentials of ``x`` without a trace: where the largest is 1, it is rounded off."""
    return torch.finfo(dtype(x)).eps / 4 if _is_shifted(x, axis) else 0.0


def _is_shifted(x: fx.Node, axis: int) -> bool:
    return is_call(x, aten.sub.Tensor) and is_maximum_of(arg(x, 1), operand(x), axis)


def _is_sum(node: object, total: fx.Node, slack: float) -> bool:
    if is_call(node, aten.add.Tensor) and isinstance(arg(node, 1), float) and 0 <= arg(node, 1) <= slack:
        node = arg(node, 0)
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
