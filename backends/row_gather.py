"""Attention for some rows only: gathers the wanted queries of each head and computes their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir.operands import BLOCK, OperandTensors, selected_pairs
from attnopt.ir.semantics import visible
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Full

AllRows = Callable[[AttentionSpec, OperandTensors], Tensor]


def attend(spec: AttentionSpec, t: OperandTensors, wanted_BHL: Tensor, all_rows: AllRows) -> Tensor:
    """``spec`` without its edits where ``wanted_BHL``, anything finite elsewhere; ``all_rows`` computes what is
    gathered.

    The output has the strides of [B, L, H, Dv], so merging the heads copies nothing.
    """
    B, H, L, _ = t.q.shape
    out = t.v.new_zeros(B, L, H, t.v.shape[3]).transpose(1, 2)
    is_whole = wanted_BHL.all(2).all(0).tolist()
    whole, partly = ([h for h in range(H) if is_whole[h] == is_it] for is_it in (True, False))
    if whole:
        out[:, whole] = all_rows(*_of_heads(spec, t, whole))
    if partly:
        out[:, partly] = _gathered(*_of_heads(spec, t, partly), wanted_BHL[:, partly], all_rows)
    return out


def _gathered(spec: AttentionSpec, t: OperandTensors, wanted_BHL: Tensor, all_rows: AllRows) -> Tensor:
    """[B, H, L, Dv]: the wanted rows of each head come first, and blocks without any of them are skipped."""
    B, H, L, _ = t.q.shape
    count = wanted_BHL.sum(2)
    n = min(L, _blocks(int(count.max())) * BLOCK)
    rows = wanted_BHL.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :n]
    has_rows = torch.arange(_blocks(n), device=count.device) * BLOCK < count.unsqueeze(-1)
    seen = visible(spec, t.q, t.k, t.mask)
    if t.selected is not None:
        pairs = selected_pairs(t.selected, L, t.k.shape[2])
        seen = pairs if seen is None else seen & pairs
    blocks = torch.ones(1, 1, 1, _blocks(t.k.shape[2]), dtype=torch.bool, device=count.device)
    if seen is not None:
        blocks = _any_row(_of_rows(_any_key(seen.expand(*seen.shape[:3], t.k.shape[2])), rows))
    mask, bias, sinks = (None if x is None else _of_rows(x, rows) for x in (seen, t.bias, t.sinks))
    part = OperandTensors(
        _of_rows(t.q, rows), t.k, t.v, bias, mask, sinks, (has_rows.unsqueeze(-1) & blocks).contiguous()
    )
    made = all_rows(replace(spec, pattern=Full()), part)
    return made.new_zeros(B, H, L, made.shape[3]).scatter_(2, rows.unsqueeze(-1).expand(made.shape), made)


def _of_rows(x: Tensor, rows_BHN: Tensor) -> Tensor:
    """Some queries of an operand that broadcasts to [B, H, L, ...], for each sequence and head its own."""
    x = x.reshape(*[1] * (4 - x.dim()), *x.shape)
    b, h, L, last = x.shape
    if L == 1:
        return x
    start = torch.arange(b * h, device=x.device).reshape(b, h, 1) * L
    taken = x.reshape(b * h * L, last).index_select(0, (start + rows_BHN).flatten())
    return taken.reshape(*rows_BHN.shape, last)


def _any_key(seen: Tensor) -> Tensor:
    """Bool [..., S] for every block of keys: whether one of them is visible."""
    S = seen.shape[-1]
    return F.pad(seen, (0, _blocks(S) * BLOCK - S)).reshape(*seen.shape[:-1], -1, BLOCK).any(-1)


def _any_row(seen: Tensor) -> Tensor:
    """Bool [..., L, blocks] for every block of queries."""
    if seen.shape[-2] == 1:
        return seen
    return _any_key(seen.transpose(-1, -2)).transpose(-1, -2)


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


def _of_heads(spec: AttentionSpec, t: OperandTensors, heads: Sequence[int]) -> tuple[AttentionSpec, OperandTensors]:
    """The attention of some heads only."""
    alone = spec.keeping(heads)
    at, groups = (torch.as_tensor(x, device=t.q.device) for x in (heads, alone.kv_heads))

    def part(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dim() < 4 or x.shape[1] == 1 else x.index_select(1, at)

    operands = OperandTensors(
        t.q.index_select(1, at),
        t.k.index_select(1, groups),
        t.v.index_select(1, groups),
        part(t.bias),
        part(t.mask),
        part(t.sinks),
        part(t.selected),
    )
    numbered = replace(alone, heads=tuple(range(alone.num_heads)), kv_heads=tuple(range(alone.num_kv_heads)))
    return numbered, operands
