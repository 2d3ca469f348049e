"""Masks and biases: the combined effect of the steps between scores and softmax, and its pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, fx

from attnopt.graph.axes import Axes
from attnopt.graph.emitter import Emitter
from attnopt.graph.evaluate import evaluate, inputs_behind, is_plain, symbols
from attnopt.graph.nodes import ancestors, aten, dtype, source_line, value
from attnopt.match.axis_roles import squares
from attnopt.match.head_operands import mapped
from attnopt.match.mask_numbers import Lengths
from attnopt.match.mask_patterns import Sample, as_visible, may_hide, name_pattern, samples
from attnopt.match.read_scores import Hide, Mapped, Multiply, Term
from attnopt.match.rearrange import Arranger
from attnopt.match.region import Region
from attnopt.match.rejection import NotAttentionError, rejected
from attnopt.patterns import Causal, Full, Pattern
from attnopt.patterns.algebra import FULL

_FAR = -1e8  # a score with this addend is negligible next to one without it
_EFFACING = -1e12  # a score with this addend vanishes
_LOST = 1e4  # a score is negligible next to another with this addend
FLOOR = -1e30  # like every other score, and later addends


def bias_and_mask(emit: Emitter, at: Arranger, r: Region) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """The bias and the visible-mask that the steps amount to, and whether a constant was dropped from the scores."""
    bias: fx.Node | None = None
    mask: fx.Node | None = None
    constant = False
    groups: Axes = (r.batch, r.heads, r.queries, r.keys)
    if r.top_left_causal and not squares(r):
        mask = _top_left(emit, at, r)
    for step in r.steps:
        if isinstance(step, Multiply):
            if step.factor < 0 and mask is not None:
                raise rejected(r.out.node, "negated-mask", "a positive factor after a mask", str(step.factor))
            bias = None if bias is None else emit.call(aten.mul.Tensor, bias, step.factor)
        elif isinstance(step, Mapped):
            bias = None if bias is None else mapped(emit, r, step.map, bias)
        elif isinstance(step, Term):
            constant = constant or step.operand is None
            bias = _plus(emit, at, bias, step, groups)
        else:
            condition = at.arrange(step.condition.node, step.condition.axes, groups)
            if dtype(condition) != torch.bool:
                condition = emit.call(aten._to_copy.default, condition, dtype=torch.bool)
            hidden = condition if step.when else emit.call(aten.bitwise_not.default, condition)
            fill = _fill(_module_of(emit), r, step, hidden)
            if fill == -math.inf:
                visible = emit.call(aten.bitwise_not.default, condition) if step.when else condition
                mask = visible if mask is None else emit.call(aten.bitwise_and.Tensor, mask, visible)
            else:
                bias = _filled(emit, bias, hidden, fill, dtype(r.q.node))
    return bias, mask, constant


def _module_of(emit: Emitter) -> fx.GraphModule:
    owner = emit.graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    return owner


def _fill(gm: fx.GraphModule, r: Region, step: Hide, hidden: fx.Node) -> float:
    """The addend that hides the same; -inf if no row can be fully masked.

    Next to a number of moderate size, a score still matters: adding it differs from writing it.  In a row that is
    fully masked, large scores can be visible next to a larger one, too (see ``hides_for_good``).
    """
    if step.fill <= _EFFACING:
        return step.fill
    if step.fill <= _FAR:
        return FLOOR if _hides_alone(r, step) else step.fill
    if _never_blind(gm, hidden):
        return -math.inf
    if not _hides_alone(r, step):
        raise _moderate_mask(step, r)
    return FLOOR


def _hides_alone(r: Region, step: Hide) -> bool:
    """A fully masked row is hidden by this number alone: its weights are then equal, for any number."""
    if torch.finfo(dtype(r.q.node)).min > FLOOR or (r.sinks is not None and may_hide(r.sinks.node, step.fill)):
        return False
    if any(isinstance(s, Mapped) for s in r.steps):  # what was added before may be larger now
        return False
    place = r.steps.index(step)
    added = [(i, s.operand.node) for i, s in enumerate(r.steps) if isinstance(s, Term) and s.operand is not None]
    if any(i > place or may_hide(node, step.fill) for i, node in added):
        return False
    return all(s.fill in (-math.inf, step.fill) for s in r.steps if isinstance(s, Hide))


def _moderate_mask(step: Hide, r: Region) -> NotAttentionError:
    known = step.condition.node if source_line(step.condition.node) else r.out.node
    return rejected(
        known,
        "moderate-mask",
        "a mask of -inf or the dtype's minimum",
        f"{step.fill:g} written over scores in rows that may be fully masked",
        "mask with -inf or torch.finfo(dtype).min",
    )


def _never_blind(gm: fx.GraphModule, hidden: fx.Node) -> bool:
    """The condition is known without the inputs, and leaves each query a key."""
    if inputs_behind(hidden) or not is_plain(hidden):
        return False
    seen = samples(gm, [hidden])
    return seen is not None and all(bool((~s.values[0]).any(-1).all()) for s in seen if s.whole_rows)


def _plus(emit: Emitter, at: Arranger, bias: fx.Node | None, step: Term, groups: Axes) -> fx.Node | None:
    if step.operand is None:
        return bias if bias is None else emit.call(aten.add.Tensor, bias, step.constant)
    term = at.arrange(step.operand.node, step.operand.axes, groups)
    if step.coefficient != 1.0:
        term = emit.call(aten.mul.Tensor, term, step.coefficient)
    return term if bias is None else emit.call(aten.add.Tensor, bias, term)


def _filled(emit: Emitter, bias: fx.Node | None, hidden: fx.Node, fill: float, kind: torch.dtype) -> fx.Node:
    kind = kind if bias is None else dtype(bias)
    device = value(hidden).device
    written = emit.call(aten.full.default, [], fill, dtype=kind, device=device)
    return emit.call(
        aten.where.self, hidden, written, bias or emit.call(aten.full.default, [], 0.0, dtype=kind, device=device)
    )


def _top_left(emit: Emitter, at: Arranger, r: Region) -> fx.Node:
    """The causal flag of the fused operator with different numbers of queries and keys: query i sees keys 0..i."""
    device = value(r.q.node).device
    rows = emit.call(aten.arange.default, at.length(r.queries), device=device)
    columns = emit.call(aten.arange.default, at.length(r.keys), device=device)
    visible = emit.call(
        aten.le.Tensor, emit.call(aten.unsqueeze.default, columns, 0), emit.call(aten.unsqueeze.default, rows, 1)
    )
    return emit.call(aten.unsqueeze.default, emit.call(aten.unsqueeze.default, visible, 0), 0)


def read_masks(
    gm: fx.GraphModule, r: Region, bias: fx.Node | None, mask: fx.Node | None, q: fx.Node, k: fx.Node
) -> tuple[Pattern, Pattern | None, fx.Node | None, fx.Node | None]:
    """(static pattern, effective mask on unpadded inputs, bias operand, mask operand)."""
    pattern: Pattern = Causal() if r.top_left_causal and squares(r) else r.pattern
    lengths = (value(q).shape[2], value(k).shape[2])
    both = [n for n in (bias, mask) if n is not None]
    if not both:
        return pattern, None, None, None
    if (found := _named(gm, both, lengths, None)) is not None:
        return _and(pattern, found), None, None, None
    if mask is not None and (found := _named(gm, [mask], lengths, None)) is not None:
        return _and(pattern, found), None, bias, None
    if bias is not None and (found := _named(gm, [bias], lengths, None)) is not None:
        pattern, bias = _and(pattern, found), None
    elif bias is not None and (found := _named(gm, [bias], lengths, None, beside=True)) is not None:
        pattern = _and(pattern, found)
    seen = _named(gm, both, lengths, 1) if all(_from_flags(n) for n in both) else None
    return pattern, None if seen is None else _and(pattern, seen), bias, mask


def hides_for_good(gm: fx.GraphModule, r: Region, pattern: Pattern) -> bool:
    """Whether a fully masked query may see, in the model, keys hidden by a finite number.

    A pattern or a mask hides completely.  A finite number does so for each query that sees another key, but not
    for one whose other keys are all masked by the inputs, such as left padding under a causal mask.  Nor is a number that is
    added as good as one that the model writes: part of the score remains.
    """
    hides = [s for s in r.steps if isinstance(s, Hide)]
    added = [(s.operand.node, s.coefficient) for s in r.steps if isinstance(s, Term) and s.operand is not None]
    given = any(inputs_behind(s.condition.node) for s in hides)
    if not given and not any(inputs_behind(n) and may_hide(n, -_LOST) for n, _ in added):
        return False
    named = pattern not in (FULL, r.pattern)
    for i, step in enumerate(hides):
        if step.fill == -math.inf:
            continue
        if _EFFACING < step.fill <= _FAR and not _hides_alone(r, step) and _hides_whole_rows(step, hides, added):
            return True
        if any(s.fill == -math.inf for s in hides[:i]):
            return True
        if not inputs_behind(step.condition.node) and (named or step.fill > _FAR):
            return True
    return named and any(_hides_by_a_number(gm, *term) for term in added)


def _hides_whole_rows(step: Hide, hides: list[Hide], added: list[tuple[fx.Node, float]]) -> bool:
    """Some row may be fully masked by ``step`` and others that hide as strongly."""
    others = [h for h in hides if h is not step and h.fill <= _FAR]
    return bool(inputs_behind(step.condition.node) or others) or any(may_hide(node, _FAR) for node, _ in added)


def keeps_a_mask(gm: fx.GraphModule, operands: Iterable[fx.Node | None]) -> bool:
    """One of these biases and masks is the same at every call and hides keys, but was not proven equal to a pattern."""
    fixed = [n for n in operands if n is not None and is_plain(n) and not inputs_behind(n)]
    return any(dtype(n) == torch.bool or bool((evaluate(gm, n, symbols(gm.graph)) <= -_LOST).any()) for n in fixed)


def hides_keys(gm: fx.GraphModule, bias: fx.Node | None) -> bool:
    """The bias may be a mask: of padding, which an input tells, or the same at every call, beside trained weights, too."""
    if bias is None:
        return False
    if inputs_behind(bias):
        return may_hide(bias, -_LOST)
    parts = (n for n in ancestors(bias) if isinstance(value(n), Tensor) and dtype(n).is_floating_point)
    return keeps_a_mask(gm, (bias,) if is_plain(bias) else parts)


def _hides_by_a_number(gm: fx.GraphModule, node: fx.Node, coefficient: float) -> bool:
    if inputs_behind(node) or not is_plain(node):
        return False
    found = evaluate(gm, node, symbols(gm.graph)) * coefficient
    return bool((found.isfinite() & (found <= -_LOST)).any())


def _and(a: Pattern, b: Pattern) -> Pattern:
    return b if isinstance(a, Full) or a == b else a if isinstance(b, Full) else a & b


def _from_flags(node: fx.Node) -> bool:
    """Derived only from integer or boolean inputs, like padding masks."""
    return all(not value(n).dtype.is_floating_point for n in inputs_behind(node) if isinstance(value(n), Tensor))


def _named(
    gm: fx.GraphModule, nodes: list[fx.Node], lengths: Lengths, fill: float | None, beside: bool = False
) -> Pattern | None:
    """The pattern of the nodes (biases and masks) combined, at every valid size of the graph.

    ``beside``: a bias may have other values where it does not hide.
    """
    if any(not is_plain(n) or (fill is None and inputs_behind(n)) for n in nodes):
        return None
    found: list[tuple[Sample, Tensor]] = []
    for sample in samples(gm, nodes, lengths, fill) or ():
        masks = [as_visible(x, beside=beside, whole_rows=sample.whole_rows) for x in sample.values]
        visible = [m for m in masks if m is not None]
        if len(visible) < len(masks):
            return None
        found.append((sample, reduce(Tensor.__and__, visible)))
    return name_pattern(found) if found else None


def hides_what_is_zeroed(gm: fx.GraphModule, bias: fx.Node | None, factor: fx.Node) -> bool:
    """``scores * m + bias`` with m of 0 and 1 means a mask, if the bias hides every key whose score m wipes out."""
    if bias is None or not all(is_plain(n) and not inputs_behind(n) for n in (bias, factor)):
        return False
    seen = samples(gm, [factor, bias])
    return seen is not None and all(_wipes_what_is_hidden(s) for s in seen)


def _wipes_what_is_hidden(sample: Sample) -> bool:
    kept, visible = sample.values[0], as_visible(sample.values[1], beside=True, whole_rows=sample.whole_rows)
    return visible is not None and bool(((kept == 1) | ((kept == 0) & ~visible)).all())
