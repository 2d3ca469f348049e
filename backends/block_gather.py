"""The kept blocks of an attention in torch operators: any device, any dtype, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attnopt.backends.reference import Reference
from attnopt.backends.sdpa import Sdpa
from attnopt.ir.attend import Attend
from attnopt.ir.operands import BLOCK, OperandTensors
from attnopt.ir.reference import reference_with_lse
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.block_layout import FULL_TILE, Layout


def attend(spec: AttentionSpec, t: OperandTensors) -> Tensor:
    """``spec`` without its edits, at known lengths."""
    B, H, L, _ = t.q.shape
    return _filled(t.v.new_zeros(B, H, _padded(L), t.v.shape[3]), spec, t, _fastest)


def attend_with_lse(spec: AttentionSpec, t: OperandTensors) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the log-sum-exp of each row as in ``AttendWithLse``."""
    B, H, L, _ = t.q.shape
    wide = torch.promote_types(t.v.dtype, torch.float32)
    o = t.v.new_zeros(B, H, _padded(L), t.v.shape[3], dtype=wide)
    top, log_sum = o.new_full((B, H, _padded(L), 1), -torch.inf), o.new_zeros(B, H, _padded(L), 1)
    if t.sinks is not None:
        top[:, :, :L], log_sum[:, :, :L] = t.sinks.detach(), t.sinks - t.sinks.detach()  # its gradient
    made = _filled(torch.cat([o, top, log_sum], -1), spec, t, _lse_beside)
    return made[..., :-2].to(t.v.dtype), made[..., -2], made[..., -1]


def _filled(out: Tensor, spec: AttentionSpec, t: OperandTensors, core_of: Callable[[AttentionSpec], Attend]) -> Tensor:
    """``out``, which holds what a query without keys gives, with the rows of all other queries."""
    B, H, L, _ = t.q.shape
    k, v = (x.expand(B, -1, -1, -1) for x in (t.k, t.v))
    for pattern, heads in _by_pattern(spec.pattern, H):
        of_heads = torch.as_tensor(heads, device=t.q.device)
        kv = torch.as_tensor([spec.kv_of_head[h] for h in heads], device=t.q.device)
        operands = OperandTensors(
            _blocks(t.q[:, of_heads], 2),
            _blocks(k[:, kv], 2),
            _blocks(v[:, kv], 2),
            _of_heads(t.bias, of_heads),
            _of_heads(t.mask, of_heads),
            _of_heads(t.sinks, of_heads),
            _of_heads(t.selected, of_heads),
        )
        for rows, o in _rows(spec, operands, pattern.layout(L, t.k.shape[2], BLOCK, BLOCK), core_of):
            places = (rows.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=t.q.device)).flatten()
            out = out.index_put((torch.arange(B, device=t.q.device).view(-1, 1, 1), of_heads.view(-1, 1), places), o)
    return out[:, :, :L]


def _of_heads(x: Tensor | None, heads: Tensor) -> Tensor | None:
    return x if x is None or x.shape[1] == 1 else x[:, heads]


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _fastest(spec: AttentionSpec) -> Attend:
    return (Sdpa() if Sdpa().check(spec) is None else Reference()).lower(spec)


def _lse_beside(spec: AttentionSpec) -> Attend:
    """The output with the two parts of the log-sum-exp as further features."""
    both = reference_with_lse(spec)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        o, top, log_sum = both(q, k, v, bias=bias, mask=mask, sinks=sinks)
        return torch.cat([o.to(top.dtype), top.unsqueeze(-1), log_sum.unsqueeze(-1)], -1)

    return attend


def _by_pattern(pattern: Pattern, heads: int) -> Iterator[tuple[Pattern, list[int]]]:
    of_head = [pattern.for_head(h) if pattern.is_per_head else pattern for h in range(heads)]
    for distinct in dict.fromkeys(of_head):
        yield distinct, [h for h, p in enumerate(of_head) if p == distinct]


def _blocks(t: Tensor, axis: int) -> Tensor:
    """The axis padded to whole blocks and split into [blocks, BLOCK]."""
    length = t.shape[axis]
    padding = -length % BLOCK
    if padding:
        t = F.pad(t, (0, 0) * (t.dim() - 1 - axis) + (0, padding))
    return t.reshape(*t.shape[:axis], -1, BLOCK, *t.shape[axis + 1 :])


def _rows(
    spec: AttentionSpec, t: OperandTensors, layout: Layout, core_of: Callable[[AttentionSpec], Attend]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Block rows with the same number of visited blocks, together: (rows [n], output [B, H, n * BLOCK, Dv]).

    Queries, keys and values are blocks [B, H, blocks, BLOCK, D].
    """
    B, H = t.q.shape[:2]
    counts = np.diff(layout.row_ptr)
    for m in np.unique(counts[counts > 0]).tolist():
        of_rows = np.flatnonzero(counts == m)
        entries = layout.row_ptr[of_rows][:, None] + np.arange(m)
        of_cols = layout.cols[entries]
        rows, cols = torch.from_numpy(of_rows).to(t.q.device), torch.from_numpy(of_cols).long().to(t.q.device)
        seen = torch.from_numpy(_seen(layout, entries)).to(t.q.device)  # [n, BLOCK, m * BLOCK]
        if t.mask is not None:
            seen = seen & _picked(t.mask, rows, cols)
        if t.selected is not None:
            kept = t.selected[:, :, rows.unsqueeze(1), cols].repeat_interleave(BLOCK, -1)  # [B, H, n, m * BLOCK]
            seen = seen & kept.unsqueeze(3)
        bias = None if t.bias is None else _folded(_picked(t.bias, rows, cols), B, H)
        sinks = None if t.sinks is None else _folded(_picked(t.sinks, rows, cols), B, H)
        as_heads = _of_blocks(spec, len(of_rows), bias is not None, sinks is not None)
        o = core_of(as_heads)(
            t.q[:, :, rows].flatten(0, 1),
            _keys(t.k, of_cols, cols),
            _keys(t.v, of_cols, cols),
            bias=bias,
            mask=_folded(seen, B, H),
            sinks=sinks,
        )
        yield rows, o.reshape(B, H, -1, o.shape[-1])


def _of_blocks(spec: AttentionSpec, n: int, has_bias: bool, has_sinks: bool) -> AttentionSpec:
    """The attention of n blocks, each in the position of a head."""
    each = AttentionSpec.of(n, n, spec.head_dim, spec.value_dim, scale=spec.scale, softcap=spec.softcap)
    return replace(each, has_bias=has_bias, has_mask=True, has_sinks=has_sinks)


def _folded(t: Tensor, B: int, H: int) -> Tensor:
    """[B|1, H|1, n, ..] as [B * H, n, ..]."""
    return t.expand(B, H, *t.shape[-3:]).flatten(0, 1)


def _seen(layout: Layout, entries: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The visible pairs [n, BLOCK, m * BLOCK] of entries [n, m]; keys after the last one are hidden."""
    n, m = entries.shape
    known = np.concatenate([layout.tiles, np.ones((1, BLOCK, BLOCK), np.bool_)])
    assert FULL_TILE == -1  # the last of them
    seen = known[layout.tile[entries]].transpose(0, 2, 1, 3).reshape(n, BLOCK, m * BLOCK)
    keys = (layout.cols[entries][:, :, None] * BLOCK + np.arange(BLOCK)).reshape(n, 1, m * BLOCK)
    return np.ascontiguousarray(seen & (keys < layout.kv_len))


def _keys(t: Tensor, cols: NDArray[np.int32], at: Tensor) -> Tensor:
    """Blocks [B, H, blocks, BLOCK, D] as [B * H, n, m * BLOCK, D], copied only if they are not a sliding window."""
    n, m = cols.shape
    first = int(cols[0, 0])
    if n > 1 and (cols == first + np.arange(n)[:, None] + np.arange(m)).all():
        flat = t.flatten(0, 1).flatten(1, 2)
        return flat.unfold(1, m * BLOCK, BLOCK)[:, first : first + n].transpose(2, 3)
    return t[:, :, at].flatten(0, 1).flatten(2, 3)


def _picked(t: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """[B|1, H|1, L|1, S|1] as [B|1, H|1, n, BLOCK|1, m * BLOCK|1]."""
    tall, wide = t.shape[2] != 1, t.shape[3] != 1
    t = _blocks(t, 2)[:, :, rows] if tall else t.unsqueeze(2).expand(-1, -1, rows.shape[0], -1, -1)
    if not wide:
        return t
    blocks = _blocks(t, 4)  # [.., n, BLOCK|1, blocks, BLOCK]
    index = cols.view(1, 1, cols.shape[0], 1, cols.shape[1], 1).expand(*blocks.shape[:4], -1, BLOCK)
    return blocks.gather(4, index).flatten(4, 5)
