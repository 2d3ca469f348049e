"""Anchors: every form in which a graph normalises scores over keys.

A softmax may be one operator, ``exp`` of its logarithm, exponentials divided by their sum, or exponentials whose sum
divides only after the product with the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attnopt.graph.cleanup import computes_same
from attnopt.graph.nodes import arg, aten, calls, is_call, is_tensor, operand, shape, wrap
from attnopt.graph.ops import FACTORS, Kind, of
from attnopt.match.fused import is_fused
from attnopt.match.overwrites import number, padding_of, zeros_of
from attnopt.match.row_sums import RowSum, behind_layout, is_shifted, of_rows, row_sums

_SOFTMAX, _LOG_SOFTMAX, _PADS = of(Kind.SOFTMAX), of(Kind.LOG_SOFTMAX), of(Kind.PAD)
_LARGEST = 700.0  # exp of more is no number, and of less than its negative 0


@dataclass(frozen=True)
class Softmax:
    """``weights`` = softmax of ``rate`` * ``scores`` over ``axis`` of the scores.

    ``late_sum``: the sum of the exponentials if it divides after the product with the values; ``weights`` are then
    the bare exponentials.  ``masked``: the exponentials, and their form before summation, if different.  ``beside``: what is
    added to the sum of exp(rate * scores), a number above 0 that takes weight without a value (softmax-one).
    """

    scores: fx.Node
    weights: fx.Node
    axis: int
    late_sum: fx.Node | None = None
    masked: tuple[fx.Node, fx.Node] | None = None
    rate: float = 1.0
    beside: float | None = None

    @property
    def may_overflow(self) -> bool:
        """Exponentials of unshifted scores: NaN among the weights need not mean a fully masked row."""
        written_out = self.late_sum is not None or calls(self.weights, FACTORS)
        return written_out and not is_shifted(self.scores, self.axis)


def normalisers(graph: fx.Graph) -> Iterator[Softmax | fx.Node]:
    """Every softmax anchor in execution order: a ``Softmax``, or the node of a fused attention operator."""
    for node in graph.nodes:
        if is_fused(node):
            yield node
        elif calls(node, _SOFTMAX):
            x = operand(node)
            yield Softmax(x, node, wrap(arg(node, 1), len(shape(x))))
        elif (power := _power(node)) is not None:
            yield from _of_power(node, *power)


def _power(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, rate) if ``node`` is exp(rate * x)."""
    if is_call(node, aten.exp.default):
        return operand(node), 1.0
    if is_call(node, aten.exp2.default):
        return operand(node), math.log(2)
    if is_call(node, aten.pow.Scalar) and arg(node, 0) > 1:
        return operand(node, 1), math.log(arg(node, 0))
    return None


def _of_power(node: fx.Node, x: fx.Node, rate: float) -> Iterator[Softmax]:
    if rate == 1 and (found := _of_logarithm(node, x)) is not None:
        yield found
        return
    for kept in (node, *(u for u in node.users if is_call(u, aten.mul.Tensor) or zeros_of(u, node) is not None)):
        for total in row_sums(kept, x if kept is node else None):
            weights = next((u for u in kept.users if total.divides(u)), None)
            if weights is None and all(is_call(u, aten.log.default) for u in total.node.users):
                return  # part of a logarithm of a softmax, or of something else's
            masked = None if kept is node else (node, kept)
            if weights is None and (sunk := _beside_sum(total, x, rate)) is not None:
                weights, scores, beside = sunk
                yield Softmax(scores, weights, total.axis, None, masked, rate, beside)
                return
            late = None if weights is not None else total.node
            yield Softmax(x, weights or kept, total.axis, late, masked, rate)
            return


def _beside_sum(total: RowSum, exponents: fx.Node, rate: float) -> tuple[fx.Node, fx.Node, float] | None:
    """(weights, scores, number) where the terms are divided by their sum and a number.  The exponents may be ``scores - m`` only
    if exp(-m) takes the place of 1 (softmax-one, as it is kept from overflow)."""
    for quotient in total.terms.users:
        if (found := total.beside(quotient)) is None:
            continue
        added, own = found
        known = number(added)
        if known is not None and known > 0:
            return quotient, exponents, known
        if not isinstance(added, fx.Node) or not is_tensor(added) or shape(added) != shape(own):
            continue
        power, shift = _power(added), _taken_off(exponents, total.axis)
        if power is None or shift is None or power[1] != rate:
            continue
        if _is_minus(power[0], shift):
            return quotient, operand(exponents), 1.0
    return None


def _taken_off(exponents: fx.Node, axis: int) -> fx.Node | None:
    """m, if the exponents are ``scores - m`` with one m for each row."""
    if not is_call(exponents, aten.sub.Tensor) or exponents.kwargs or not is_tensor(arg(exponents, 0)):
        return None
    return of_rows(arg(exponents, 1), operand(exponents), axis)


def _is_minus(node: fx.Node, shift: fx.Node) -> bool:
    node = behind_layout(node)
    return is_call(node, aten.neg.default) and computes_same(behind_layout(operand(node)), shift)


def _of_logarithm(node: fx.Node, x: fx.Node) -> Softmax | None:
    """``node`` = exp(x), and ``x`` is the logarithm of a softmax: one operator, or scores less the logarithm of a sum."""
    if calls(x, _LOG_SOFTMAX):
        return Softmax(operand(x), node, wrap(arg(x, 1), len(shape(x))))
    if not is_call(x, aten.sub.Tensor) or x.kwargs:
        return None
    scores, taken = arg(x, 0), arg(x, 1)
    if not is_tensor(scores):
        return None
    for axis in range(len(shape(x))):
        if _is_logarithm_of_sum(taken, scores, axis):
            return Softmax(scores, node, axis)
        if (beside := _beside_in_logarithm(taken, scores, axis)) is not None and abs(beside) < _LARGEST:
            return Softmax(scores, node, axis, beside=math.exp(beside))
    return None


def _beside_in_logarithm(node: object, scores: fx.Node, axis: int) -> float | None:
    """The number c of log(exp(c) + sum(exp(scores))) over ``axis``, once for each row."""
    root = of_rows(node, scores, axis)
    if root is None:
        return None
    if is_call(root, aten.logaddexp.default):
        sums = ((arg(root, a), arg(root, b)) for a, b in ((0, 1), (1, 0)))
        return next((number(c) for total, c in sums if _is_logarithm_of_sum(total, scores, axis)), None)
    if not is_call(root, aten.logsumexp.default) or [wrap(d, len(shape(scores))) for d in arg(root, 1)] != [axis]:
        return None
    return _one_more(arg(root, 0), scores, axis)


def _one_more(node: fx.Node, scores: fx.Node, axis: int) -> float | None:
    """The number of which ``node`` has one more column than ``scores``, at either end."""
    if calls(node, _PADS):
        widths, value = arg(node, 1), padding_of(node)
        is_one = sorted(widths[:2]) == [0, 1] and not any(widths[2:]) and axis == len(shape(scores)) - 1
        return value if arg(node, 0) is scores and is_one else None
    if not is_call(node, aten.cat.default) or wrap(arg(node, 1, 0), len(shape(scores))) != axis:
        return None
    others = [part for part in arg(node, 0) if part is not scores]
    if len(arg(node, 0)) != 2 or len(others) != 1 or shape(others[0])[axis] != 1:
        return None
    return number(others[0])


def _is_logarithm_of_sum(node: object, scores: fx.Node, axis: int) -> bool:
    """``node`` = log(sum(exp(scores))) over ``axis``, or m + log(sum(exp(scores - m))), once for each row."""
    root = of_rows(node, scores, axis)
    if is_call(root, aten.logsumexp.default):
        return arg(root, 0) is scores and [wrap(d, len(shape(scores))) for d in arg(root, 1)] == [axis]
    if root is not None and is_call(root, aten.add.Tensor) and not root.kwargs:
        left, right = arg(root, 0), arg(root, 1)
        return any(_is_logarithm_less(a, scores, m, axis) for a, m in ((left, right), (right, left)))
    return _is_logarithm_less(node, scores, None, axis)


def _is_logarithm_less(node: object, scores: fx.Node, shift: object, axis: int) -> bool:
    """``node`` = log(sum(exp(scores - shift))) over ``axis``, or of the unshifted scores if ``shift`` is None."""
    root = of_rows(node, scores, axis)
    if root is None or not is_call(root, aten.log.default):
        return False
    total = behind_layout(operand(root))
    terms: fx.Node = arg(total, 0)
    if not is_call(terms, aten.exp.default) or not any(r.node is total and r.axis == axis for r in row_sums(terms)):
        return False
    x = operand(terms)
    return x is scores if shift is None else is_call(x, aten.sub.Tensor) and x.args == (scores, shift) and not x.kwargs
