"""The weight that keys receive, summed over queries, without a map of weights: an operator that works block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.base.bit_table import indices

_HELD = 1 << 21  # weights that exist at a time


@torch.library.custom_op("attnopt::received_weights", mutates_args=())
def received_weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    senders: Tensor | None,
    kv_of_head: Sequence[int],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """[B, H, S], float32 or wider: the sum over the queries of the weights of each key, as in ``AttentionSpec``; queries that
    see nothing give none.

    ``q`` [B, H, L, D], ``k`` [B, G, S, D], ``bias`` and ``mask`` broadcast to [B, H, L, S], ``sinks`` to [B, H, L, 1];
    ``senders``, bool [B|1, L]: the queries that count, None for all.
    """
    B, H, L, _ = q.shape
    rows = max(1, _HELD // max(1, B * H * k.shape[2]))
    total: Tensor | None = None
    for first in range(0, L, rows):
        at = slice(first, first + rows)
        added, seen, sunk = (x if x is None or x.shape[2] == 1 else x[:, :, at] for x in (bias, mask, sinks))
        who = None if senders is None else senders[:, at]
        part = written_out(q[:, :, at], k, added, seen, sunk, who, kv_of_head, scale, softcap)
        total = part if total is None else total.add_(part)
    return _zeros(q, k) if total is None else total


@received_weights.register_fake
def _shape(q: Tensor, k: Tensor, *_: object) -> Tensor:
    return _zeros(q, k)


def _zeros(q: Tensor, k: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], q.shape[1], k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))


def written_out(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    senders: Tensor | None,
    kv_of_head: Sequence[int],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The same in plain operators, with the map of all these queries."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if list(kv_of_head) != list(range(k.shape[1])):
        k = k.index_select(1, indices(kv_of_head, k.device))
    s = (q.to(wide) * scale) @ k.to(wide).mT
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(wide)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(wide).expand(*s.shape[:3], 1)], 3)
    p = s.softmax(-1)
    if mask is not None or bias is not None:
        p = p.masked_fill((s == -torch.inf).all(-1, keepdim=True), 0.0)
    if sinks is not None:
        p = p[..., :-1]
    if senders is None:
        return p.sum(2)
    return (senders[:, None, None].to(wide) @ p).squeeze(2)


RECEIVED = torch.ops.attnopt.received_weights.default  # in a graph
