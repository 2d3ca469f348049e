"""Only some rows of an attention: the queries of a head that are wanted, gathered, each head with its own number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnopt.backends.lowering import visible
from attnopt.backends.reference import Reference
from attnopt.backends.sdpa import Sdpa
from attnopt.operands import Operands, selected_pairs
from attnopt.patterns import Full
from attnopt.spec import AttentionSpec


def attend(
    spec: AttentionSpec, t: Operands, wanted_BHL: Tensor, all_rows: Callable[[AttentionSpec, Operands], Tensor]
) -> Tensor:
    """``spec`` without its gains where ``wanted_BHL``, zeros elsewhere; ``all_rows`` computes heads that are wanted whole.

    The output has the strides of [B, L, H, Dv], so that merging the heads copies nothing.
    """
    B, H, L, _ = t.q.shape
    out = t.v.new_zeros(B, L, H, t.v.shape[3]).transpose(1, 2)
    is_whole = wanted_BHL.all(2).all(0).tolist()
    whole = [h for h in range(H) if is_whole[h]]
    if whole:
        alone = spec.keeping(whole)
        out[:, whole] = all_rows(replace(alone, heads=tuple(range(len(whole)))), _of_heads(t, alone, whole))
    if len(whole) == H:
        return out
    seen = visible(spec, t.q, t.k, t.mask)
    if t.selected is not None:
        pairs = selected_pairs(t.selected, L, t.k.shape[2])
        seen = pairs if seen is None else seen & pairs
    for h in range(H):
        for b in () if is_whole[h] else range(B):
            rows = wanted_BHL[b, h].nonzero().flatten()
            if len(rows):
                out[b, h].index_copy_(0, rows, _rows(spec, replace(t, mask=seen), b, h, rows))
    return out


def _rows(spec: AttentionSpec, t: Operands, b: int, h: int, rows: Tensor) -> Tensor:
    """[rows, Dv] of one head of one sequence."""
    g = spec.kv_of_head[h]
    alone = replace(spec.keeping([h]), pattern=Full(), kv_of_head=(0,), kv_heads=(0,))
    backend = Sdpa() if Sdpa().check(alone) is None and t.sinks is None else Reference()
    q, k, v = (x[b : b + 1, i : i + 1] for x, i in ((t.q, h), (t.k, g), (t.v, g)))
    bias, mask, sinks = (_part(x, b, h, rows) for x in (t.bias, t.mask, t.sinks))
    return backend.lower(alone)(q.index_select(2, rows), k, v, bias=bias, mask=mask, sinks=sinks)[0, 0]


def _part(x: Tensor | None, b: int, h: int, rows: Tensor) -> Tensor | None:
    """Of an operand that broadcasts to [B, H, L, S] the part of one sequence, one head and some queries."""
    if x is None:
        return None
    x = x.reshape(*[1] * (4 - x.dim()), *x.shape)
    i, j = (0 if size == 1 else at for size, at in zip(x.shape[:2], (b, h), strict=True))
    one = x[i : i + 1, j : j + 1]
    return one if one.shape[2] == 1 else one.index_select(2, rows)


def _of_heads(t: Operands, alone: AttentionSpec, heads: Sequence[int]) -> Operands:
    """The operands of ``alone``, which has only these of the heads."""
    at = torch.as_tensor(heads, device=t.q.device)
    groups = torch.as_tensor(alone.kv_heads, device=t.q.device)

    def part(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dim() < 4 or x.shape[1] == 1 else x.index_select(1, at)

    return Operands(
        t.q.index_select(1, at),
        t.k.index_select(1, groups),
        t.v.index_select(1, groups),
        part(t.bias),
        part(t.mask),
        part(t.sinks),
        part(t.selected),
    )
