"""Folding: parts of a plan that the output projection absorbs, at no run-time cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from attnopt.ir.activations import merged
from attnopt.ir.head_additions import without_shifts
from attnopt.ir.head_edits import constant_heads
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.site_edit import SiteEdit
from attnopt.match.find import Found

E = TypeVar("E", bound=SiteEdit)


def folded(found: Found, plan: E) -> E:
    """Constant heads and shifts folded into the output bias, and gains into the output weights."""
    if found.site.projections["out"].rows is None or found.output_op is None:
        return plan
    return _gains(found, _shifts(found, _constants(found, plan)))


def _gains(found: Found, plan: E) -> E:
    spec = plan.spec
    scaled = [
        HeadWeights("out", h, weight * gain)
        for h, gain in spec.gains.items()
        if (weight := _out_weight(found, plan, h)) is not None
    ]
    return replace(plan, spec=spec.without_gains(), edits=merged(plan.edits, scaled))


def _shifts(found: Found, plan: E) -> E:
    """What is added to the outputs of heads at every token."""
    left, added = without_shifts(plan.spec.after)
    bias = _bias(found, plan)
    if bias is None or left == plan.spec.after:
        return plan
    return replace(plan, spec=replace(plan.spec, after=left), out_bias=_moved(found, plan, bias, added))


def _constants(found: Found, plan: E) -> E:
    spec, bias = plan.spec, _bias(found, plan)
    if spec.rows is not None:
        return plan  # the queries of all heads choose the rows
    known = constant_heads(spec.after)
    silent = {h for h, value in known.items() if not bool(value.any())}
    gone = [h for h in known if h in silent or bias is not None]
    if len(gone) == spec.num_heads:
        gone = gone[1:]  # one head must stay; `lower` then computes no attention
    if not gone:
        return plan
    made = replace(plan, spec=spec.keeping(set(spec.heads) - {*gone}))
    moved = {h: known[h] for h in gone if h not in silent}
    return made if bias is None or not moved else replace(made, out_bias=_moved(found, plan, bias, moved))


def _bias(found: Found, plan: SiteEdit) -> Tensor | None:
    """Today's output bias, if head outputs that are the same for every token can move into it."""
    if not found.site.projections["out"].direct:
        return None
    return found.site.out_bias() if plan.out_bias is None else plan.out_bias


def _moved(found: Found, plan: SiteEdit, bias: Tensor, values: Mapping[int, Tensor]) -> Tensor:
    """``bias`` in float64 with what the output projection makes of ``values`` [Dv] of heads."""
    for h, value in values.items():
        weight = _out_weight(found, plan, h)
        assert weight is not None
        bias = bias.double() + value.to(weight.device) @ weight.double()
    return bias


def _out_weight(found: Found, plan: SiteEdit, head: int) -> Tensor | None:
    """Today's output weights [Dv, out] of a head."""
    new = {e.head: e.weight for e in plan.edits if e.role == "out"}
    return new.get(head, found.site.head_weight("out", head))
