"""From the softmax anchor back to the product of queries and keys, reading every operation on the scores in between."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from attnopt.graph.axes import FOLLOWED, Axes, broadcast, follow, resolve_all
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import (
    ancestors,
    arg,
    aten,
    calls,
    is_call,
    is_tensor,
    operand,
    shape,
    wrap,
)
from attnopt.graph.ops import ADD, COPIES, DIV, FACTORS, SUB, Kind, named, of
from attnopt.graph.products import Product, product_of
from attnopt.match.clamped_scores import CLAMPS, Bounds, bounds_of, joined, scaled
from attnopt.match.head_maps import HeadMap, head_map, maps_heads
from attnopt.match.overwrites import MASKED_FILL, WHERE, Overwrite, number, overwrite_of, padding_of
from attnopt.match.rejection import NotAttentionError, rejected

_LEAST_SINK = 1e3  # a number beyond hides the sink, or all keys
MAX_DEPTH = 40  # operators from the softmax to a product: no spelling of one attention comes near
_RSUB = named("rsub")
_SUMS = ADD | SUB | _RSUB
_ONE_BY_ONE = frozenset(FOLLOWED) | _SUMS | FACTORS | CLAMPS | MASKED_FILL | named("tanh neg")
_PROJECTIONS = named("linear addmm") | of(Kind.CONVOLUTION)  # products of weights, unlike those of activations
_SPREAD = COPIES | of(Kind.EXPAND)
_PADS = of(Kind.PAD)


@dataclass(frozen=True)
class Operand:
    """A tensor that meets the scores: ``axes`` in terms of the scores' atoms."""

    node: fx.Node
    axes: Axes


@dataclass(frozen=True)
class Factor(Operand):
    """It multiplies the scores, or ``divides`` them."""

    divides: bool = False


@dataclass(frozen=True)
class Term:
    """The bias becomes bias + coefficient * operand."""

    operand: Operand | None
    coefficient: float
    constant: float = 0.0


@dataclass(frozen=True)
class Hide:
    """The bias becomes ``fill`` (or 1 * the filling operand) wherever ``condition`` is ``when``."""

    condition: Operand
    when: bool
    fill: float


@dataclass(frozen=True)
class Multiply:
    """The bias so far is multiplied by a number."""

    factor: float


@dataclass(frozen=True)
class Mapped:
    """The bias so far is mapped across heads, as the scores beside it are."""

    map: HeadMap


Step = Term | Hide | Multiply | Mapped


@dataclass(frozen=True)
class Scores:
    """softmax input = softcap(clamp(scale * product)) with ``steps`` applied to the bias, in their order.

    ``axes`` are those of the softmax input; ``factors`` are tensors that multiply or divide the product and do not vary
    over both queries and keys; ``wipes`` multiply scores that were capped or biased before, which only a mask of 0 and 1 may do;
    ``sinks`` or ``sink_value``, multiplied by ``sink_rate``, is a logit that joins each row.
    """

    product: Product
    axes: Axes
    scale: float = 1.0
    clamp: Bounds | None = None  # then there is no softcap
    softcap: float | None = None
    steps: tuple[Step, ...] = ()
    factors: tuple[Factor, ...] = ()
    wipes: tuple[Operand, ...] = ()
    sinks: Operand | None = None
    sink_value: float | None = None
    sink_rate: float = 1.0
    score_map: HeadMap | None = None  # of the scaled product, before ``steps``
    before_sinks: int = 0  # steps that came before that logit
    path: tuple[fx.Node, ...] = ()
    frames: tuple[tuple[fx.Node, Axes], ...] = field(default=(), repr=False)

    @property
    def has_sink(self) -> bool:
        return self.sinks is not None or self.sink_value is not None

    def with_sink(self, value: float) -> Scores | None:
        """With this number as a logit beside them; None if there is one already, or if it takes no weight."""
        if self.has_sink or not -_LEAST_SINK < value < _LEAST_SINK:
            return None
        return replace(self, sink_value=value, before_sinks=len(self.steps))


def read_scores(node: fx.Node, axis: int, rate: float = 1.0) -> Scores:
    """Understand ``node``, which a softmax over ``axis`` gets multiplied by ``rate``.  Raises NotAttentionError."""
    found, blocked = _search(node, axis, 0)
    if found is None:
        raise _no_product(blocked or node)
    return found if rate == 1 else _scaled(found, rate)


def _no_product(node: fx.Node) -> NotAttentionError:
    found, hint = f"{node.name} = {getattr(node.target, '__name__', node.target)}", ""
    if calls(node, _PROJECTIONS) and not inputs_behind(arg(node, 1)):
        found = f"{found}, a projection of one sequence"
        hint = (
            "each token predicts its weights itself, as in dynamic convolution or outlook attention: there are no keys"
        )
    expected = "scores computed from a product of queries and keys"
    return rejected(node, "no-query-key-product", expected, found, hint)


def _search(node: fx.Node, axis: int, depth: int) -> tuple[Scores | None, fx.Node | None]:
    """(the scores that end in ``node``, or None and the deepest node that stopped the search)."""
    if (product := product_of(node)) is not None and is_query_key(product):
        return _of_mapped(node, (product.left, product.right), axis, depth) or _start(product), None
    if depth > MAX_DEPTH or node.op != "call_function" or not tensor_like(node):
        return None, node
    blocked: fx.Node | None = None
    found: Scores | None = None
    for source in _candidates(node):
        inner, stopped = _search(source, axis, depth + 1)
        if inner is None:
            blocked = blocked or stopped
            continue
        stepped = _step(node, source, inner)
        if stepped is None:
            blocked = node
            continue
        made = replace(stepped, path=(*stepped.path, node), frames=(*stepped.frames, (node, stepped.axes)))
        if all(map(inputs_behind, (made.product.left, made.product.right))):
            return made, None
        found = found or made  # beside a product of queries and keys, one with a table of positions is a bias
    return (None, blocked or node) if found is None else (found, None)


def _of_mapped(node: fx.Node, sources: tuple[fx.Node, ...], axis: int, depth: int) -> Scores | None:
    """The scores that end in ``node``, if it maps the heads of others."""
    for source in sources:
        if maps_heads(node, source) and (inner := _search(source, axis, depth + 1)[0]) is not None:
            mapped = _map_heads(node, source, inner)
            if mapped is not None:
                return replace(mapped, path=(*mapped.path, node), frames=(*mapped.frames, (node, mapped.axes)))
    return None


def tensor_like(node: fx.Node) -> bool:
    return is_tensor(node) and len(shape(node)) >= 2


def is_query_key(product: Product) -> bool:
    """Both operands are activations, or one is a learned query: never a plain projection by weights."""
    left, right = (bool(inputs_behind(n)) for n in (product.left, product.right))
    if is_call(product.node, aten.linear.default):
        return left and right
    return left or right or (is_projected(product.left) and is_projected(product.right))


def is_projected(node: fx.Node) -> bool:
    """Made by a projection, be it of learned queries only, as in the first layer of a decoder that detects objects."""
    return any(calls(n, _PROJECTIONS) for n in ancestors(node))


def _start(product: Product) -> Scores:
    scores = Scores(product, product.axes, product.alpha, path=(product.node,), frames=((product.node, product.axes),))
    if product.addend is None:
        return scores
    axes = broadcast(product.addend, product.axes)
    if axes is None:
        raise _no_product(product.node)
    return replace(scores, steps=(Term(Operand(product.addend, axes), product.beta),))


def _candidates(node: fx.Node) -> list[fx.Node]:
    """The arguments through which the scores may run."""
    if calls(node, WHERE):
        return [n for n in (arg(node, 1), arg(node, 2)) if is_tensor(n) and tensor_like(n)]
    if is_call(node, aten.cat.default):
        return [n for n in arg(node, 0) if tensor_like(n)]
    if calls(node, _PADS) or (calls(node, _PROJECTIONS) and maps_heads(node, arg(node, 0))):
        return [operand(node)]
    if not calls(node, _ONE_BY_ONE):
        return []
    same = [n for n in (arg(node, 0), arg(node, 1)) if is_tensor(n) and tensor_like(n)]
    return [n for n in same if math.prod(shape(n)) == math.prod(shape(node))]


def _step(node: fx.Node, source: fx.Node, s: Scores) -> Scores | None:
    """The scores after ``node``, which got them as ``source``."""
    if node.target in FOLLOWED:
        axes = follow(node, s.axes)
        return None if axes is None else replace(s, axes=axes)
    if calls(node, FACTORS):
        return _multiply(node, source, s)
    if is_call(node, aten.neg.default):
        return _scaled(s, -1.0)
    if calls(node, _SUMS):
        return _add(node, source, s)
    if (written := overwrite_of(node, source)) is not None:
        return _hide(s, written)
    if calls(node, CLAMPS):
        return _clamped(node, source, s)
    if is_call(node, aten.tanh.default):
        return replace(s, softcap=1.0) if _is_bare(s) else None
    if is_call(node, aten.cat.default):
        return _sink(node, source, s)
    if calls(node, _PADS):
        return _padded(node, s)
    return _map_heads(node, source, s)


def _is_bare(s: Scores) -> bool:
    """Nothing but factors was applied to the product."""
    return s.softcap is None and s.clamp is None and not s.steps and not s.has_sink and s.score_map is None


def _clamped(node: fx.Node, source: fx.Node, s: Scores) -> Scores | None:
    """Nothing but factors may have been applied to the product before."""
    found = bounds_of(node, source)
    if found == (None, None):
        return s
    if found is None or not _is_bare(replace(s, clamp=None)):
        return None
    return replace(s, clamp=found if s.clamp is None else joined(s.clamp, found))


def _map_heads(node: fx.Node, source: fx.Node, s: Scores) -> Scores | None:
    """The product and what is added to it are mapped; a cap or a mask before is left to the model."""
    found = head_map(node, source, s.axes)
    hides = any(isinstance(step, Hide) for step in s.steps) or bool(s.wipes)
    if found is None or hides or s.softcap is not None or s.clamp is not None or s.has_sink or s.score_map is not None:
        return None
    made, axes = found
    steps: tuple[Step, ...] = (*s.steps, Mapped(made)) if s.steps else ()
    steps = steps if made.added is None else (*steps, Term(Operand(made.added, (made.axis,)), 1.0))
    return replace(s, axes=axes, score_map=made, steps=steps)


def _other(node: fx.Node, source: fx.Node) -> Any:
    return arg(node, 1) if arg(node, 0) is source else arg(node, 0)


def _scaled(s: Scores, factor: float) -> Scores:
    """Everything so far multiplied by a number; a capped product keeps its shape only if the cap moves with it."""
    steps = (*s.steps, Multiply(factor)) if s.steps else ()
    s = replace(s, sink_rate=s.sink_rate * factor) if s.has_sink else s
    s = s if s.clamp is None else replace(s, clamp=scaled(s.clamp, factor))
    if s.softcap is None:
        return replace(s, scale=s.scale * factor, steps=steps)
    return replace(s, softcap=s.softcap * abs(factor), scale=s.scale * factor, steps=steps)


def _multiply(node: fx.Node, source: fx.Node, s: Scores) -> Scores | None:
    other = _other(node, source)
    divides = calls(node, DIV)
    if divides and arg(node, 0) is not source:
        return None
    factor = number(other)
    if factor is not None:
        return None if factor == 0 and s.softcap is not None else _scaled(s, 1.0 / factor if divides else factor)
    if not is_tensor(other):
        return None
    axes = broadcast(other, s.axes)
    if axes is None:
        return None
    if s.score_map is not None:
        return None  # it would have to be known whether heads differ in it
    if not s.steps and s.softcap is None and s.clamp is None:
        return replace(s, factors=(*s.factors, *(Factor(o.node, o.axes, divides) for o in _outer(other, axes, s.axes))))
    return None if divides else replace(s, wipes=(*s.wipes, Operand(other, axes)))


def _outer(node: fx.Node, axes: Axes, frame: Axes) -> tuple[Operand, ...]:
    """A factor of the scores, or the two that it is the outer product of, such as norms of queries and of keys."""
    parts = node.args if is_call(node, aten.mul.Tensor) else ()
    found = [(x, broadcast(x, frame)) for x in parts if is_tensor(x)]
    is_outer = len(found) == 2 and all(own is not None and own != axes for _, own in found)
    return tuple(Operand(x, own) for x, own in found if own is not None) if is_outer else (Operand(node, axes),)


def _add(node: fx.Node, source: fx.Node, s: Scores) -> Scores | None:
    other = _other(node, source)
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or alpha == 0:
        return None
    sign = float(alpha)
    if calls(node, _RSUB):  # other - alpha * scores
        if arg(node, 0) is not source:
            return None
        s, sign = _scaled(s, -sign), 1.0
    elif calls(node, SUB):
        if arg(node, 0) is not source:
            s, sign = _scaled(s, -sign), 1.0
        else:
            sign = -sign
    elif arg(node, 0) is not source:  # other + alpha * scores
        s, sign = (_scaled(s, sign) if sign != 1 else s), 1.0
    constant = number(other)
    if constant is not None:
        return replace(s, steps=(*s.steps, Term(None, 1.0, sign * constant)))
    while calls(other, _SPREAD):
        other = arg(other, 0)
    if not is_tensor(other):
        return None
    axes = broadcast(other, s.axes)
    return None if axes is None else replace(s, steps=(*s.steps, Term(Operand(other, axes), sign)))


def _hide(s: Scores, written: Overwrite) -> Scores | None:
    hide = hiding(written, s.axes)
    return None if hide is None else replace(s, steps=(*s.steps, hide))


def hiding(written: Overwrite, frame: Axes) -> Hide | None:
    """What is written over a tensor with the axes ``frame``; None if the condition does not broadcast to it."""
    axes = broadcast(written.condition, frame)
    return None if axes is None else Hide(Operand(written.condition, axes), written.when, written.fill)


def _sink(node: fx.Node, source: fx.Node, s: Scores) -> Scores | None:
    """``cat([scores, sink], -1)``, or in reverse order: an extra column that takes weight without a value."""
    parts = arg(node, 0)
    dim = wrap(arg(node, 1, 0), len(s.axes))
    if len(parts) != 2 or s.has_sink or not s.axes[dim]:
        return None
    column = parts[1] if parts[0] is source else parts[0]
    if not is_tensor(column) or shape(column)[dim] != 1:
        return None
    around: Axes = tuple(() if i == dim else a for i, a in enumerate(resolve_all(s.axes)))
    if any(size not in (1, math.prod(a.size for a in axis)) for size, axis in zip(shape(column), around, strict=True)):
        return None
    axes: Axes = tuple(ax if n != 1 else () for n, ax in zip(shape(column), around, strict=True))
    return replace(s, sinks=Operand(column, axes), before_sinks=len(s.steps))


def _padded(node: fx.Node, s: Scores) -> Scores | None:
    """One more column of a number, at either end of the last axis."""
    widths, value = arg(node, 1), padding_of(node)
    if value is None or sorted(widths[:2]) != [0, 1] or any(widths[2:]) or not s.axes[-1]:
        return None
    return s.with_sink(value)
