"""Pieces that backends share.  All of them trace to plain operators, with no constant lifted into the graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from attnopt.patterns import Full
from attnopt.spec import AttentionSpec


def visible(spec: AttentionSpec, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """Bool [B|1, H|1, L|1, S]: the mask operand and the pattern together; None where every query sees every key."""
    q_len, kv_len = q.shape[2], k.shape[2]
    if _sees_all(spec, q_len, kv_len):
        return mask
    pattern = spec.pattern.mask(q_len, kv_len, num_heads=spec.num_heads, device=q.device).unsqueeze(0)
    return pattern if mask is None else mask & pattern


def heads_of(spec: AttentionSpec, kv: Tensor) -> Tensor:
    """Keys or values [B, G, S, D] as [B, H, S, D]: the one that each query head reads."""
    if spec.kv_of_head == tuple(range(spec.num_kv_heads)):
        return kv
    return kv.index_select(1, _indices(spec.kv_of_head, kv.device))


def with_gains(spec: AttentionSpec, o: Tensor) -> Tensor:
    """Output [B, H, L, Dv] times each head's gain."""
    if spec.gains is None:
        return o
    if len(set(spec.gains)) == 1:
        return o * spec.gains[0]
    runs = [(gain, len(list(run))) for gain, run in groupby(spec.gains)]
    column = torch.cat([torch.full((n,), gain, dtype=o.dtype, device=o.device) for gain, n in runs])
    return o * column.reshape(1, -1, 1, 1)


def _sees_all(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    """Whether the pattern hides nothing.  A symbolic length is not decided upon: that would guard the graph."""
    if spec.pattern == Full():
        return True
    if not (is_concrete_int(q_len) and is_concrete_int(kv_len)):
        return False
    return spec.pattern.covers(int(q_len), int(kv_len), num_heads=spec.num_heads)


def _indices(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` as an int64 tensor, made of ranges: ``torch.tensor`` would become a constant of the traced graph."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return torch.cat([torch.arange(run[0], run[-1] + 1, device=device) for run in runs])
