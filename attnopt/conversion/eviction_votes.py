"""The attention that each key of an evicting cache receives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnopt.patterns.algebra import Pattern

ROWS = 128  # queries at a time


def held_mask(mask: Tensor | None, pattern: Pattern, heads: int, rows: range, total: int, positions: Tensor) -> Tensor:
    """[B, H, n, S] for the queries of the tokens ``rows`` and the keys at ``positions`` [B, G, S] of ``total`` tokens.

    ``mask`` [B or 1, H or 1, n, total]: bool, or float to be added.  No query sees a later key.
    """
    n, stop = len(rows), rows.stop
    seen = pad(pattern.mask(n, stop, num_heads=heads, device=positions.device), (0, total - stop)).unsqueeze(0)
    shown = seen
    if mask is not None:
        shown = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    B, G, S = positions.shape
    index = positions.repeat_interleave(heads // G, dim=1).unsqueeze(2).expand(B, heads, n, S)
    return shown.expand(B, heads, n, total).gather(-1, index)


def votes_of(
    q: Tensor,
    k: Tensor,
    shown: Tensor,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
    counted: Tensor | None,
) -> Tensor:
    """The attention probability [B, G, S] that keys [B, G, S, D] receive from queries [B, H, n, D] in total.

    ``shown`` [B, H, n, S]: bool, or float to be added.  ``counted`` [B, 1 or H, n]: queries that count; None for all.
    """
    B, H, n, D = q.shape
    G, S = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(dtype).reshape(B, G, -1, D) @ k.to(dtype).transpose(-1, -2) * scale).view(B, H, n, S)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else s + shown
    if s_aux is not None:
        s = torch.cat([s, s_aux.to(dtype).view(1, -1, 1, 1).expand(B, H, n, 1)], dim=-1)
    p = s.softmax(-1)[..., :S].nan_to_num(0.0)  # NaN: a query that sees nothing
    if counted is not None:
        p = p * counted.unsqueeze(-1)
    return p.view(B, G, -1, S).sum(2)


def are_tokens(mask: Tensor, first: int) -> Tensor:
    """[B or 1, H or 1, n]: the queries, from the token ``first`` on, that are no padding, whose own key a mask hides."""
    own = mask.diagonal(first, dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
