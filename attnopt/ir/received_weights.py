"""The weight that keys receive, summed over queries, without a map of weights: an operator that works block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from attnopt.base.bit_table import indices

_HELD = 1 << 18  # weights that exist at a time: what a cache of the processor holds


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
    k, total = _of_heads(k, kv_of_head), _zeros(q, k)
    for b, h, i in _blocks(q.shape[0], q.shape[1], q.shape[2], k.shape[2]):
        added, seen, sunk = (None if x is None else _part(x, b, h, i) for x in (bias, mask, sinks))
        who = None if senders is None else senders[b if len(senders) > 1 else slice(None), i]
        heads = range(total[b, h].shape[1])
        total[b, h] += written_out(q[b, h, i], k[b, h], added, seen, sunk, who, heads, scale, softcap)
    return total


def _blocks(B: int, H: int, L: int, S: int) -> Iterator[tuple[slice, slice, slice]]:
    """Sequences, heads and queries whose weights exist at a time."""
    if B * H * L * S <= _HELD:
        yield slice(0, B), slice(0, H), slice(0, L)
        return
    rows = min(L, max(1, _HELD // S))
    heads = max(1, _HELD // (rows * S))
    for b, h, i in product(range(B), range(0, H, heads), range(0, L, rows)):
        yield slice(b, b + 1), slice(h, h + heads), slice(i, i + rows)


def _part(x: Tensor, *at: slice) -> Tensor:
    """A part of an operand whose axes may be broadcast."""
    return x[tuple(own if size > 1 else slice(None) for size, own in zip(x.shape, at, strict=False))]


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
    s = (q.to(wide) * scale) @ _of_heads(k, kv_of_head).to(wide).mT
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


def _of_heads(k: Tensor, kv_of_head: Sequence[int]) -> Tensor:
    return k if list(kv_of_head) == list(range(k.shape[1])) else k.index_select(1, indices(kv_of_head, k.device))


RECEIVED = torch.ops.attnopt.received_weights.default  # in a graph
