"""What happens to the result of a chain's first product before the second one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import fx

from attnopt.graph.axes import FOLLOWED, Axes, Axis, broadcast, follow, resolve_all
from attnopt.graph.nodes import arg, aten, calls, is_call, is_number, is_tensor, opname, shape, wrap
from attnopt.graph.ops import DIV, FACTORS
from attnopt.match.chains import RUNNING, TRIANGLES, Chain
from attnopt.match.overwrites import number, zeros_of
from attnopt.match.read_scores import Factor, Hide, hiding
from attnopt.match.rejection import NotAttentionError, rejected, unreadable
from attnopt.match.row_quotient import RowQuotient, Sides, quotient_of


@dataclass(frozen=True)
class Triangle:
    """Zeros on one side of a diagonal of the axes ``rows`` and ``columns``: below it if it is ``upper``."""

    rows: Axis
    columns: Axis
    upper: bool
    diagonal: int


@dataclass(frozen=True)
class Ratio:
    """A number that is known from sizes alone multiplies, or ``divides``."""

    node: fx.Node
    divides: bool


@dataclass(frozen=True)
class ChainWeights:
    """The product times ``scale``, ``ratios`` and ``factors``, with zeros where ``hides`` and ``triangles`` say so, and then
    divided.  ``axes``: of the last node.  ``running``: along it each place has the sum of all up to it."""

    axes: Axes
    scale: float
    ratios: tuple[Ratio, ...] = ()
    factors: tuple[Factor, ...] = ()
    hides: tuple[Hide, ...] = ()
    triangles: tuple[Triangle, ...] = ()
    running: Axis = ()
    quotient: RowQuotient | None = None
    frames: tuple[tuple[fx.Node, Axes], ...] = field(default=(), repr=False)

    @property
    def tells_pairs(self) -> bool:
        """Something is not the same for all pairs."""
        return bool(self.triangles or self.hides or self.factors)


def read_chain(chain: Chain, sides: Sides) -> ChainWeights:
    """Raises NotAttentionError."""
    made = ChainWeights(chain.first.axes, chain.first.alpha * chain.second.alpha)
    for source, node in pairwise(chain.path):
        stepped = _step(node, source, made, sides)
        if stepped is None:
            raise _unlike(node)
        made = replace(stepped, frames=(*stepped.frames, (node, stepped.axes)))
    return made


def _step(node: fx.Node, source: fx.Node, w: ChainWeights, sides: Sides) -> ChainWeights | None:
    if node.target in FOLLOWED:
        axes = follow(node, w.axes)
        if axes is None:
            raise unreadable(node, "weights with traceable axes")
        return replace(w, axes=axes)
    if w.quotient is not None:  # the sum would have to know of what comes later
        return None
    if is_call(node, aten.neg.default):
        return replace(w, scale=-w.scale)
    if calls(node, RUNNING):
        axis = resolve_all(w.axes)[wrap(arg(node, 1), len(shape(node)))]
        return None if w.running or w.tells_pairs else replace(w, running=axis)
    if calls(node, TRIANGLES):
        return _triangle(node, w)
    if calls(node, FACTORS) and (other := _other(node, source)) is not None:
        known = number(other)
        if known is not None and not (known == 0 and calls(node, DIV)):
            return replace(w, scale=w.scale / known if calls(node, DIV) else w.scale * known)
    if (zeros := zeros_of(node, source)) is not None:
        hide = hiding(zeros, w.axes)
        return None if hide is None else replace(w, hides=(*w.hides, hide))
    return _multiplied(node, source, w, sides) if calls(node, FACTORS) else None


def _other(node: fx.Node, source: fx.Node) -> object:
    """The operand beside ``source``; None if ``source`` divides."""
    if arg(node, 0) is source:
        return arg(node, 1)
    return None if calls(node, DIV) else arg(node, 0)


def _multiplied(node: fx.Node, source: fx.Node, w: ChainWeights, sides: Sides) -> ChainWeights | None:
    other = _other(node, source)
    if not isinstance(other, fx.Node) or other is source:
        return None
    if is_number(other):
        return replace(w, ratios=(*w.ratios, Ratio(other, calls(node, DIV))))
    if (quotient := quotient_of(node, source, sides)) is not None:
        return replace(w, quotient=quotient)
    axes = broadcast(other, w.axes) if is_tensor(other) else None
    return None if axes is None else replace(w, factors=(*w.factors, Factor(other, axes, calls(node, DIV))))


def _triangle(node: fx.Node, w: ChainWeights) -> ChainWeights | None:
    axes, diagonal = resolve_all(w.axes), arg(node, 1, 0)
    if len(axes) < 2 or not isinstance(diagonal, int):
        return None
    rows, columns = (axes[wrap(d, len(shape(node)))] for d in (-2, -1))
    made = Triangle(rows, columns, opname(node) == "triu", diagonal)
    return replace(w, triangles=(*w.triangles, made))


def _unlike(node: fx.Node) -> NotAttentionError:
    found = f"{node.name} = {opname(node)} on the weights"
    raised = rejected(node, "weights-changed", "weights that a mask or a decay multiplies", found)
    return NotAttentionError(raised.refusal, node, near=False)
