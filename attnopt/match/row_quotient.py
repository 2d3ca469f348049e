"""The division of an attention without a softmax: of its weights, or of its output, by the sums of its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import fx

from attnopt.graph.axes import FOLLOWED, Axes, follow
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import ancestors, arg, calls, is_tensor, operand
from attnopt.graph.ops import ADD, MUL, Kind, named, of
from attnopt.graph.products import PRODUCTS
from attnopt.match.overwrites import number
from attnopt.match.rejection import rejected
from attnopt.match.row_sums import divisors, inverse_of

_LONGEST = 8  # layout changes between the product and the division
_CLAMPS = named("clamp clamp_min")
_ABSOLUTE, _DETACHED = named("abs"), named("detach")
_SPREAD = frozenset(FOLLOWED) | of(Kind.EXPAND)
_SUMS = frozenset(PRODUCTS) | frozenset(FOLLOWED) | MUL | named("sum cumsum")


@dataclass(frozen=True)
class RowQuotient:
    """``node`` divides by the sums, by their absolute values if ``absolute``, by ``least`` if that is more, with ``added`` to it;
    no gradient flows to them if they are ``detached``."""

    node: fx.Node
    added: float
    least: float | None
    absolute: bool = False
    detached: bool = False


@dataclass(frozen=True)
class Sides:
    """Where weights come from: their own nodes, and tensors with the numbers of queries and of keys."""

    weights: Collection[fx.Node]
    queries: Collection[fx.Node]
    keys: Collection[fx.Node]

    @property
    def every(self) -> set[fx.Node]:
        return {*self.weights, *self.queries, *self.keys}


def quotient_of(node: fx.Node, dividend: fx.Node, sides: Sides) -> RowQuotient | None:
    """How ``node`` divides ``dividend``; None if it does not divide by anything that weights, queries or keys make.

    Raises NotAttentionError if it divides by something of theirs that is no sum of the weights."""
    for divisor, inverse in divisors(node, dividend):
        if not isinstance(divisor, fx.Node) or not sides.every & set(ancestors(divisor, stop=sides.every.__contains__)):
            continue
        found = _read(divisor, inverse)
        if found is None or not _is_sum(found[0], sides):
            raise rejected(
                node,
                "other-normaliser",
                "weights that are not divided, or by their sum and a number",
                f"{node.name}, which divides by something else that queries and keys make",
            )
        detached = any(calls(n, _DETACHED) for n in ancestors(divisor, stop=sides.every.__contains__))
        return RowQuotient(node, *found[1:], detached)
    return None


def late_quotient_of(product: fx.Node, axes: Axes, sides: Sides) -> tuple[RowQuotient, Axes] | None:
    """How the result of a product, which has ``axes``, is divided, possibly after layout changes.  Raises NotAttentionError."""
    stack = [(product, axes, 0)]
    while stack:
        node, axes, depth = stack.pop(0)
        for user in node.users:
            if (found := quotient_of(user, node, sides)) is not None:
                return found, axes
            if user.target in FOLLOWED and depth < _LONGEST:
                followed = follow(user, axes)
                if followed is None:
                    continue
                stack.append((user, followed, depth + 1))
    return None


def _read(divisor: fx.Node, inverse: bool) -> tuple[fx.Node, float, float | None, bool] | None:
    """(what is made positive, what is added to it, what it is at least, whether its absolute value is taken before both)."""
    node, added, least, absolute = divisor, 0.0, None, False
    while True:
        if inverse and (above := inverse_of(node)) is not None:
            node, inverse = above, False
        elif calls(node, _SPREAD) or (calls(node, MUL) and number(arg(node, 1)) == 1):
            node = operand(node)
        elif not inverse and least is None and not absolute and not node.kwargs and (by := _added(node)) is not None:
            node, added = by[0], added + by[1]
        elif (
            not inverse
            and least is None
            and not absolute
            and calls(node, _CLAMPS)
            and not node.kwargs
            and arg(node, 2) is None
        ):
            least = number(arg(node, 1))
            if least is None:
                return None
            node = operand(node)
        elif not inverse and not absolute and calls(node, _ABSOLUTE):
            node, absolute = operand(node), True
        else:
            return None if inverse else (node, added, least, absolute)


def _added(node: fx.Node) -> tuple[fx.Node, float] | None:
    if not calls(node, ADD):
        return None
    for own, other in ((arg(node, 0), arg(node, 1)), (arg(node, 1), arg(node, 0))):
        if is_tensor(own) and inputs_behind(own) and (known := number(other)) is not None:
            return own, known
    return None


def _is_sum(total: fx.Node, sides: Sides) -> bool:
    """Computed from weights, or from queries and keys, by sums and products alone: whose, the proof of the attention shows."""
    reached = set(_reached(total, sides))
    if None in reached:
        return False
    return bool(reached & set(sides.weights)) or bool(reached & set(sides.queries) and reached & set(sides.keys))


def _reached(total: fx.Node, sides: Sides) -> Iterator[fx.Node | None]:
    """The nodes of ``sides`` that it is computed from; None for an operator that is no sum, product or layout change."""
    stack, seen = [total], {total}
    while stack:
        node = stack.pop()
        if node in sides.every:
            yield node
            continue
        if not inputs_behind(node):
            continue
        if not calls(node, _SUMS):
            yield None
            return
        above = [n for n in node.all_input_nodes if is_tensor(n) and n not in seen]
        seen.update(above)
        stack.extend(above)
