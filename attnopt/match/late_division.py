"""A softmax whose sum divides after the product with the values, however both were laid out in between."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.graph.axes import FOLLOWED, Axes, follow, resolve_all
from attnopt.graph.nodes import arg
from attnopt.graph.products import Product
from attnopt.match.read_scores import Operand
from attnopt.match.rejection import rejected, unreadable
from attnopt.match.row_sums import divisors, way_down

_LONGEST = 8  # layout changes between the product and the division


@dataclass(frozen=True)
class LateQuotient:
    """``node`` = the product with the values, after ``over``, divided by the sum of exponentials, after ``under``."""

    node: fx.Node
    over: tuple[fx.Node, ...]
    under: tuple[fx.Node, ...]  # the first one is the sum itself

    def divided(self, product: Product, scores: Axes, axis: int) -> Operand:
        """The quotient with its axes; ``scores`` are those of the exponentials, summed over ``axis``.

        Raises NotAttentionError if a row of the product is not divided by its own sum.
        """
        axes = _followed(self.over, product.axes)
        scores = resolve_all(scores)
        kept = bool(arg(self.under[0], 2, False))
        total = tuple(() if i == axis else a for i, a in enumerate(scores) if kept or i != axis)
        below = _followed(self.under[1:], total)
        axes, below = resolve_all(axes), resolve_all(below)
        aligned = axes[len(axes) - len(below) :] if len(below) <= len(axes) else ()
        if len(aligned) != len(below) or any(own and own != other for own, other in zip(below, aligned, strict=True)):
            raise rejected(
                self.node,
                "late-division",
                "the output of each query divided by its own sum of exponentials",
                f"{self.node.name}, which divides by the sum of another query",
            )
        return Operand(self.node, axes)


def _followed(nodes: tuple[fx.Node, ...], axes: Axes) -> Axes:
    for node in nodes:
        found = follow(node, axes)
        if found is None:
            raise unreadable(node, "a supported layout between the values and the late division")
        axes = found
    return axes


def late_quotient(product: fx.Node, total: fx.Node) -> LateQuotient | None:
    """The division of ``product`` by ``total``, possibly after layout changes; None if there is none."""
    stack: list[tuple[fx.Node, ...]] = [()]
    while stack:
        over = stack.pop(0)
        end = over[-1] if over else product
        for user in end.users:
            for divisor, inverse in divisors(user, end):
                under = way_down(divisor, total, inverse, lambda n: n.target in FOLLOWED)
                if under is not None:
                    return LateQuotient(user, over, under)
            if user.target in FOLLOWED and len(over) < _LONGEST:
                stack.append((*over, user))
    return None
