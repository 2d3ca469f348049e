"""Attention weights of some queries at a time: what a column sum needs, without the map of all queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.ir.activations import Activations
from attnopt.ir.operands import HIDING, OperandTensors
from attnopt.ir.reference import reference_weights
from attnopt.ir.row_operands import of_rows, pattern_rows, rows_of
from attnopt.ir.semantics import heads_of
from attnopt.ir.spec import AttentionSpec

ENTRIES = 1 << 22  # of all heads, computed at once


@dataclass(frozen=True)
class WeightRows:
    """Some queries of one sequence: ``rows`` [N], none of them padding, and their ``weights`` [H, N, S] in float64."""

    batch: int
    sequence: int
    rows: Tensor
    weights: Tensor
    keys: Tensor  # bool [S]: those that are no padding
    queries: int  # L, all of the sequence


def weight_rows(now: Activations, spec: AttentionSpec, entries: int = ENTRIES) -> Iterator[WeightRows]:
    """The attention weights of all queries that are no padding under ``spec`` without its edits, block after block."""
    for batch, (t, everything) in enumerate(zip(now.operands(spec), now.batches, strict=True)):
        L, S = t.q.shape[2], t.k.shape[2]
        size = rows_at_once(spec, S, entries)
        for sequence in range(len(t.q)):
            own, keys = of_sequence(t, sequence), everything.seen[sequence]
            for rows in in_blocks(everything.real[sequence], size):
                yield WeightRows(batch, sequence, rows, weights_of(spec, own, rows), keys, L)


def rows_at_once(spec: AttentionSpec, keys: int, entries: int = ENTRIES) -> int:
    return max(1, entries // (spec.num_heads * max(keys, 1)))


def in_blocks(counted_L: Tensor, size: int) -> tuple[Tensor, ...]:
    """The places of the tokens that count, at most ``size`` at a time."""
    return torch.split(counted_L.nonzero().flatten(), size)


def weights_of(spec: AttentionSpec, t: OperandTensors, rows: Tensor) -> Tensor:
    """[H, N, S] in float64: the weights of the queries ``rows`` of the one sequence in ``t``."""
    with torch.no_grad():
        if spec.weight_gains is not None or spec.selection is not None:  # these compare whole rows of blocks, or pieces
            return reference_weights(spec)(t.q, t.k, **t.others)[0, :, rows].double()
        wide = replace(t, q=t.q.double(), k=t.k.double())  # in which no visible key has a weight of 0
        bare, own = of_rows(spec, wide, rows)
        return reference_weights(bare)(own.q, own.k, **own.others)[0]


def logits_of(spec: AttentionSpec, t: OperandTensors, rows: Tensor) -> tuple[Tensor, Tensor]:
    """scale * q k' [H, N, S] in float64, without bias and softcap, and bool [H|1, N, S]: the keys that each query sees."""
    with torch.no_grad():
        q, k = t.q[0].index_select(1, rows).double(), heads_of(spec, t.k)[0].double()
        if spec.pooling is not None:
            k = spec.pooling.applied(spec.heads, k.unsqueeze(0))[0]
        seen = visible_rows(spec, t, rows)
        return spec.scale * (q @ k.mT), seen


def visible_rows(spec: AttentionSpec, t: OperandTensors, rows: Tensor) -> Tensor:
    """Bool [H|1, N, S]: which keys these queries see, by pattern, mask and a bias that hides."""
    seen = pattern_rows(spec, t, rows)
    if t.mask is not None:
        seen = seen & rows_of(t.mask, rows)[0]
    if t.bias is not None:
        bias = rows_of(t.bias, rows)[0].double()
        seen = seen & (bias > bias.amax(-1, keepdim=True) + HIDING)
    return seen.expand(-1, len(rows), t.k.shape[2])


def of_sequence(t: OperandTensors, sequence: int) -> OperandTensors:
    """The operands of one sequence of the batch."""
    own = t.map(lambda _, x: x[sequence : sequence + 1] if x.shape[0] == len(t.q) else x)
    given = (own.q, own.k, own.v, own.bias, own.mask, own.sinks)
    return OperandTensors(*given, keep=own.keep, added=own.added, is_cross=t.is_cross)
