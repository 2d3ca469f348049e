"""Folding: parts of a plan that the output projection absorbs, at no run-time cost."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from attnopt.ir.activations import merged
from attnopt.ir.head_edits import constant_heads
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.site_edit import SiteEdit
from attnopt.match.find import Found

E = TypeVar("E", bound=SiteEdit)


def folded(found: Found, plan: E) -> E:
    """Constant heads folded into the output bias, and gains into the output weights."""
    if found.site.projections["out"].rows is None or found.output_op is None:
        return plan
    return _gains(found, _constants(found, plan))


def _gains(found: Found, plan: E) -> E:
    spec = plan.spec
    scaled = [
        HeadWeights("out", h, weight * gain)
        for h, gain in spec.gains.items()
        if (weight := _out_weight(found, plan, h)) is not None
    ]
    return replace(plan, spec=spec.without_gains(), edits=merged(plan.edits, scaled))


def _constants(found: Found, plan: E) -> E:
    spec, site = plan.spec, found.site
    known = constant_heads(spec.after)
    silent = {h for h, value in known.items() if not bool(value.any())}
    bias = site.out_bias() if plan.out_bias is None else plan.out_bias
    can_move = bias is not None and site.projections["out"].direct
    gone = [h for h in known if h in silent or can_move]
    if len(gone) == spec.num_heads:
        gone = gone[1:]  # one head must stay; `lower` then computes no attention
    for h in gone:
        if h not in silent:
            weight = _out_weight(found, plan, h)
            assert weight is not None
            assert bias is not None
            bias = bias.double() + known[h].to(weight.device) @ weight.double()
    if not gone:
        return plan
    moved = any(h not in silent for h in gone)
    return replace(plan, spec=spec.keeping(set(spec.heads) - {*gone}), out_bias=bias if moved else plan.out_bias)


def _out_weight(found: Found, plan: SiteEdit, head: int) -> Tensor | None:
    """Today's output weights [Dv, out] of a head."""
    new = {e.head: e.weight for e in plan.edits if e.role == "out"}
    return new.get(head, found.site.head_weight("out", head))
