"""Sums of exponentials over keys, and how they divide: written as a sum or a norm, kept from zero, inverted, laid out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from attnopt.base.sizes import same_size
from attnopt.graph.nodes import arg, aten, calls, dtype, is_call, is_tensor, operand, shape, value, wrap
from attnopt.graph.ops import ADD, COPIES, FACTORS, IN_ORDER, Kind, named, of
from attnopt.match.overwrites import number

_MAXIMA = named("amax max.dim")
_CLAMPS = named("clamp clamp_min")
_KEEPING = _CLAMPS | ADD
_SPREAD = COPIES | of(Kind.EXPAND)


@dataclass(frozen=True)
class RowSum:
    """``node`` = the sum of the non-negative ``terms`` over ``axis``.

    ``shifted``: one term of each row is 1, so the sum is at least 1.
    """

    node: fx.Node
    terms: fx.Node
    axis: int
    shifted: bool

    def divides(self, quotient: fx.Node) -> bool:
        """``quotient`` is the terms, each divided by the sum of its row, up to negligible guards against zero."""
        return any(self._is_under(node, inverse) for node, inverse in divisors(quotient, self.terms))

    def beside(self, quotient: fx.Node) -> tuple[object, fx.Node] | None:
        """What is added to the sum before it divides the terms to ``quotient``, a number or a tensor, and the sum, in its layout
        there."""
        for divisor, inverse in divisors(quotient, self.terms):
            node = _unspread(divisor)
            if node is None or not _is_by_row(node, self.terms, self.axis):
                continue
            node = behind_layout(node)
            inverted = inverse_of(node) if inverse else node
            node = None if inverted is None else behind_layout(inverted)
            if not calls(node, ADD) or node is None or node.kwargs:
                continue
            for own, other in ((arg(node, 0), arg(node, 1)), (arg(node, 1), arg(node, 0))):
                if isinstance(own, fx.Node) and behind_layout(own) is self.node:
                    return other, own
        return None

    def _is_under(self, divisor: object, inverse: bool) -> bool:
        node = _unspread(divisor)
        if node is None or not _is_by_row(node, self.terms, self.axis):
            return False
        return way_down(node, self.node, inverse, lambda n: calls(n, IN_ORDER), self._keeps_from_zero) is not None

    def _keeps_from_zero(self, node: fx.Node) -> bool:
        """An addend is rounded off next to a sum of at least 1; a clamp below 1 has no effect on it."""
        least = number(arg(node, 1)) if calls(node, _KEEPING) and not node.kwargs else None
        if not self.shifted or least is None or least < 0:
            return False
        if not calls(node, _CLAMPS):
            return least <= torch.finfo(dtype(node)).eps / 4
        return least <= 1 and arg(node, 2) is None


def row_sums(terms: fx.Node, shifted_on: fx.Node | None = None) -> list[RowSum]:
    """Every sum of ``terms`` over one axis; ``shifted_on``: the exponents, if possibly shifted."""
    found: list[RowSum] = []
    for user in terms.users:
        dims = _summed(user, terms)
        if dims is not None and len(dims) == 1:
            axis = wrap(dims[0], len(shape(terms)))
            found.append(RowSum(user, terms, axis, shifted_on is not None and is_shifted(shifted_on, axis)))
    return found


def _summed(node: fx.Node, terms: fx.Node) -> list[int] | None:
    if is_call(node, aten.sum.dim_IntList) and arg(node, 0) is terms:
        dims = arg(node, 1)
    elif is_call(node, aten.linalg_vector_norm.default) and arg(node, 0) is terms and arg(node, 1) == 1:
        dims = arg(node, 2)
    else:
        return None
    return dims if isinstance(dims, list) else None


def divisors(quotient: fx.Node, x: fx.Node) -> Iterator[tuple[object, bool]]:
    """What ``quotient`` may divide ``x`` by, and whether it multiplies with the inverse of that."""
    left, right = arg(quotient, 0), arg(quotient, 1)
    if is_call(quotient, aten.div.Tensor) and left is x and not quotient.kwargs:
        yield right, False
    if is_call(quotient, aten.mul.Tensor):
        yield from ((other, True) for own, other in ((left, right), (right, left)) if own is x)


def way_down(
    divisor: object,
    total: fx.Node,
    inverse: bool,
    is_layout: Callable[[fx.Node], bool],
    passes: Callable[[fx.Node], bool] = lambda n: False,
) -> tuple[fx.Node, ...] | None:
    """The nodes from ``total`` to ``divisor``, without the inversion; None if there are unsupported ones.

    ``passes``: the operators allowed on the sum before inversion.
    """
    path, node = list[fx.Node](), divisor
    while node is not total:
        if not isinstance(node, fx.Node):
            return None
        if inverse and (above := inverse_of(node)) is not None:
            node, inverse = above, False
        elif is_layout(node) or (not inverse and passes(node)):
            path.append(node)
            node = arg(node, 0)
        else:
            return None
    return None if inverse else (total, *reversed(path))


def inverse_of(node: fx.Node) -> fx.Node | None:
    """x, if ``node`` is 1 / x."""
    if is_call(node, aten.reciprocal.default) or (is_call(node, aten.pow.Tensor_Scalar) and arg(node, 1) == -1):
        found: fx.Node = arg(node, 0)
        return found
    return None


def renormalises(node: fx.Node, weights: fx.Node, axis: int) -> bool:
    """``node`` divides the weights of a softmax by their sum over ``axis``, which is 1."""
    return any(replace(s, shifted=True).divides(node) for s in row_sums(weights) if s.axis == axis)


def is_shifted(exponents: fx.Node, axis: int) -> bool:
    """The row maximum was subtracted, so the largest exponent is 0, with or without a positive factor."""
    while calls(exponents, FACTORS) and (number(arg(exponents, 1)) or 0) > 0:
        exponents = operand(exponents)
    if not is_call(exponents, aten.sub.Tensor) or exponents.kwargs or not is_tensor(arg(exponents, 0)):
        return False
    return is_maximum_of(arg(exponents, 1), operand(exponents), axis)


def is_maximum_of(node: object, scores: fx.Node, axis: int) -> bool:
    """``node`` is the maximum of ``scores`` over ``axis``, once for each row: subtracting it changes no softmax."""
    root = of_rows(node, scores, axis)
    if root is not None and is_call(root, operator.getitem) and arg(root, 1) == 0:
        root = operand(root)
    if root is None or not calls(root, _MAXIMA) or arg(root, 0) is not scores:
        return False
    dims = arg(root, 1)
    only = dims if isinstance(dims, int) else dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else None
    return isinstance(only, int) and wrap(only, len(shape(scores))) == axis


def of_rows(node: object, rows: fx.Node, axis: int) -> fx.Node | None:
    """``node`` without layout changes, if it has one number per row of ``rows`` along ``axis``; otherwise None."""
    found = _unspread(node)
    return behind_layout(found) if found is not None and _is_by_row(found, rows, axis) else None


def behind_layout(node: fx.Node) -> fx.Node:
    """The tensor whose numbers ``node`` has, in the same order."""
    while calls(node, IN_ORDER):
        node = operand(node)
    return node


def _unspread(node: object) -> fx.Node | None:
    while calls(node, _SPREAD):
        node = arg(node, 0)
    return node if isinstance(node, fx.Node) and is_tensor(node) else None


def _is_by_row(node: fx.Node, rows: fx.Node, axis: int) -> bool:
    """It has the axes of ``rows``, with length 1 along ``axis``: rows match, regardless of reshapes."""
    sizes = list(value(rows).shape)
    sizes[axis] = 1
    own = value(node).shape
    return len(own) == len(sizes) and all(map(same_size, own, sizes))
