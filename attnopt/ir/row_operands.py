"""Some queries of an attention, as an attention of its own."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from attnopt.base.sizes import is_static
from attnopt.ir.operands import OperandTensors
from attnopt.ir.semantics import row_sinks
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.algebra import FULL


def of_rows(spec: AttentionSpec, t: OperandTensors, rows: Tensor) -> tuple[AttentionSpec, OperandTensors]:
    """The attention of the queries ``rows`` alone, without edits.  Their rows of the pattern become a mask, zero keys sinks."""
    mask = None if t.mask is None else rows_of(t.mask, rows)
    if spec.pattern != FULL:
        seen = pattern_rows(spec, t, rows).unsqueeze(0)
        mask = seen if mask is None else mask & seen
    sinks = row_sinks(spec, t.q, t.k, t.sinks)
    bias, sinks, keep, added = (None if x is None else rows_of(x, rows) for x in (t.bias, sinks, t.keep, t.added))
    own = replace(
        spec,
        pattern=FULL,
        seen_as=None,
        zero_keys=None,
        has_mask=mask is not None,
        has_sinks=sinks is not None,
        after=(),
    )
    return own, OperandTensors(t.q.index_select(2, rows), t.k, t.v, bias, mask, sinks, keep=keep, added=added)


def pattern_rows(spec: AttentionSpec, t: OperandTensors, rows: Tensor) -> Tensor:
    """Bool [H|1, R, S]: the keys that the pattern shows to these queries."""
    q_len, kv_len = t.q.shape[2], t.k.shape[2]
    return spec.pattern.mask(q_len, kv_len, num_heads=spec.num_heads, device=t.q.device, rows=rows)


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of an operand [.., L|1, S|1]."""
    return x if is_static(x.shape[2]) and x.shape[2] == 1 else x.index_select(2, rows)
