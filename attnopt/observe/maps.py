"""Scores and weights of some queries of an attention.  r rows cost what r queries cost: no other row is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnopt.ir.operands import OperandTensors
from attnopt.ir.reference import scores_of, softmax_of, weights_of
from attnopt.ir.row_operands import of_rows
from attnopt.ir.spec import AttentionSpec

ELEMENTS = 1 << 21  # of a map that are computed at a time


def scores(spec: AttentionSpec, t: OperandTensors, rows: Tensor | None = None) -> Tensor:
    """What the softmax reads, [B, H, R, S]: scaled, with softcap and bias, -inf where hidden; float32 or wider."""
    own, chosen = _of_rows(spec, t, rows)
    return scores_of(own, chosen.q, chosen.k, chosen.bias, chosen.mask, chosen.sinks)[0]


def weights(spec: AttentionSpec, t: OperandTensors, rows: Tensor | None = None) -> Tensor:
    """What multiplies the values, [B, H, R, S], gains and map included; float32 or wider."""
    if spec.weight_gains is not None and rows is not None:
        return weights(spec, t).index_select(2, rows)  # a gain may depend on the mass of a part of its row
    own, chosen = _of_rows(spec, t, rows)
    p = weights_of(own, chosen.q, chosen.k, chosen.bias, chosen.mask, chosen.sinks)
    if chosen.added is None:
        return p
    kept = p if chosen.keep is None else p * chosen.keep.to(p.dtype)
    return kept + chosen.added.to(p.dtype)


def log_sum_exp(spec: AttentionSpec, t: OperandTensors, rows: Tensor | None = None) -> Tensor:
    """Of each row of scores, its sink included, [B, H, R]; -inf where a query sees nothing."""
    own, chosen = _of_rows(spec, t, rows)
    s, sinks = scores_of(own, chosen.q, chosen.k, chosen.bias, chosen.mask, chosen.sinks)
    _, top, log_sum = softmax_of(s, sinks)
    return top + log_sum


def column_sums(spec: AttentionSpec, t: OperandTensors, counted: Tensor, rows: Tensor | None = None) -> Tensor:
    """The weight that each key gets from the queries that are ``counted``, bool [B, L]: [B, H, S].  No map is kept."""
    total = torch.zeros(())
    if spec.weight_gains is not None:
        chosen = counted if rows is None else counted.index_select(1, rows)
        return (weights(spec, t, rows) * chosen[:, None, :, None]).sum(2)
    for block in blocks(t, spec.num_heads, rows):
        factor = counted.index_select(1, block).unsqueeze(1)  # [B, 1, R]
        if t.added is not None:
            total = total + (weights(spec, t, block) * factor.unsqueeze(-1)).sum(2)
            continue
        own, given = _of_rows(spec, t, block)
        s, sinks = scores_of(own, given.q, given.k, given.bias, given.mask, given.sinks)
        if sinks is None:
            p = torch.softmax(s, -1)  # one operator, twice as fast as its parts
            blind = p[..., 0].isnan()
            total = total + _summed(p.masked_fill_(blind.unsqueeze(-1), 0.0) if bool(blind.any()) else p, factor)
            continue
        top, log_sum = softmax_of(s, sinks)[1:]
        base = top.masked_fill(top == -torch.inf, 0.0) + log_sum
        total = total + _summed(s.sub_(base.unsqueeze(-1)).exp_(), factor)
    return total


def _summed(p: Tensor, factor: Tensor) -> Tensor:
    """Over the queries, each times its factor [B, 1, R]."""
    return (factor.unsqueeze(-2) @ p).squeeze(-2)


def blocks(t: OperandTensors, heads: int, rows: Tensor | None) -> Iterator[Tensor]:
    """The queries, in runs whose map has at most ``ELEMENTS`` entries."""
    every = torch.arange(t.q.shape[2], device=t.q.device) if rows is None else rows
    size = max(1, ELEMENTS // max(1, t.q.shape[0] * heads * t.k.shape[2]))
    yield from torch.split(every, size)


def _of_rows(spec: AttentionSpec, t: OperandTensors, rows: Tensor | None) -> tuple[AttentionSpec, OperandTensors]:
    """The attention of these queries alone; None: of all."""
    return (spec, t) if rows is None else of_rows(spec, t, rows)
