"""Tokens of one segment side by side, so that blocks of them see few blocks of keys, or are sequences of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.ir.attend import Attend
from attnopt.ir.operands import OperandTensors, SegmentTensors
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Full, Pattern, Segments
from attnopt.patterns.algebra import FULL


def sorted_by_segment(pattern: Pattern) -> Pattern:
    """As it is when tokens of one segment are side by side."""
    return pattern.side_by_side if isinstance(pattern, Segments) else pattern


def side_by_side(spec: AttentionSpec, t: OperandTensors) -> tuple[AttentionSpec, OperandTensors, Tensor | None]:
    """The attention with keys moved, and the order [B|1, L] in which to take the queries; None for their own.

    Nothing moves where a pattern or a selection of blocks depends on the places of tokens.
    """
    spec, t = _in_tensors(spec, t)
    if t.segments is None or spec.pattern != Full() or t.selected is not None:
        return spec, t, None
    queries = _order(t.segments.queries)
    keys = queries if t.segments.keys is t.segments.queries else _order(t.segments.keys)
    if keys is None:
        return spec, t, queries
    ids = t.segments.keys.gather(1, keys)
    bias, mask = (x if x is None or x.shape[3] == 1 else _moved(x.mT, keys).mT for x in (t.bias, t.mask))
    segments = SegmentTensors(t.segments.queries, ids, t.segments.pairs)
    moved = replace(t, k=_moved(t.k, keys), v=_moved(t.v, keys), bias=bias, mask=mask, segments=segments)
    return spec, moved, queries


def in_batches(pattern: Segments, core: Attend) -> Attend:
    """``core``, which sees all keys, on each segment of a grid of tokens as one more sequence of the batch."""
    assert pattern.grid is not None
    outer, size, inner = pattern.grid

    def apart(x: Tensor) -> Tensor:
        B, H, _, D = x.shape
        return x.reshape(B, H, outer, size, inner, D).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        o = core(apart(q), apart(k), apart(v), bias=bias, mask=mask, sinks=sinks)
        return o.reshape(-1, outer, inner, *o.shape[1:]).permute(0, 3, 1, 4, 2, 5).flatten(2, 4)

    return attend


def _in_tensors(spec: AttentionSpec, t: OperandTensors) -> tuple[AttentionSpec, OperandTensors]:
    """Scattered segments of a pattern as those of a call."""
    pattern = spec.pattern
    if not isinstance(pattern, Segments) or t.segments is not None or pattern.side_by_side == pattern:
        return spec, t
    segments = _known(pattern, t.q.shape[2], t.k.shape[2], t.q.device)
    return replace(spec, pattern=FULL), replace(t, segments=segments)


@lru_cache(maxsize=64)
def _known(pattern: Segments, q_len: int, kv_len: int, device: torch.device) -> SegmentTensors:
    queries = pattern.at(torch.arange(kv_len - q_len, kv_len, device=device))
    keys = pattern.at(torch.arange(kv_len, device=device))
    pairs = pattern.numbered_pairs
    table = None if pairs is None else SegmentTensors.table([pairs]).to(device)
    return SegmentTensors(queries.unsqueeze(0), keys.unsqueeze(0), table)


def _order(ids: Tensor) -> Tensor | None:
    """[B|1, length]: the tokens by segment; None if they are in this order."""
    if bool((ids[:, 1:] >= ids[:, :-1]).all()):
        return None
    return ids.argsort(dim=1, stable=True)


def _moved(x: Tensor, order: Tensor) -> Tensor:
    """The third axis of ``x`` [B|1, H|1, length, ...] in this order."""
    if order.shape[0] == 1:
        return x.index_select(2, order[0])
    each = x.expand(order.shape[0], *x.shape[1:])
    return torch.stack([one.index_select(1, own) for one, own in zip(each, order, strict=True)])
