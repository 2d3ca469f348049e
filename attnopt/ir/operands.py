"""The tensors that one attention is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ROLES = ("q", "k", "v", "bias", "mask", "sinks")  # the operands of the canonical attention, in their order
BLOCK = 64  # queries and keys per block of a selection


@dataclass(frozen=True)
class Operands:
    """q [B, H, L, D], k [B, G, S, D], v [B, G, S, Dv]; bias and mask broadcast to [B, H, L, S], sinks to [B, H, L, 1].

    ``selected``, bool [B, H, ceil(L / BLOCK), ceil(S / BLOCK)], further hides blocks of keys from blocks of queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    selected: Tensor | None = None

    @cached_property
    def seen(self) -> Tensor:
        """Bool [B, S]: the keys that some query can see."""
        B, S = self.k.shape[0], self.k.shape[2]
        everything = torch.ones(B, S, dtype=torch.bool, device=self.k.device)
        if self.bias is None and self.mask is None:
            return everything
        bias = torch.zeros((), device=self.q.device) if self.bias is None else self.bias.float()
        if self.mask is not None:
            bias = bias + torch.zeros_like(self.mask, dtype=torch.float32).masked_fill(~self.mask, -torch.inf)
        bias = bias.expand(B, -1, -1, S)
        top = bias.amax(-1, keepdim=True)
        seen: Tensor = ((bias - top.masked_fill(top == -torch.inf, 0.0)).exp() > 0).flatten(1, 2).any(1)
        return seen if bool(seen.any()) else everything

    @cached_property
    def real(self) -> Tensor:
        """Bool [B, L]: the tokens that are not padding, i.e. visible to some query.

        Keys from another sequence say nothing about the queries: every query then counts.
        """
        B, L = self.q.shape[0], self.q.shape[2]
        return self.seen if self.k.shape[2] == L else torch.ones(B, L, dtype=torch.bool, device=self.q.device)


def selected_pairs(selected: Tensor, q_len: int, kv_len: int) -> Tensor:
    """A selection of blocks as the mask that it means, bool [B, H, L, S]."""
    B, H, rows, cols = selected.shape
    wide = selected[:, :, :, None, :, None].expand(-1, -1, -1, BLOCK, -1, BLOCK)
    return wide.reshape(B, H, rows * BLOCK, cols * BLOCK)[:, :, :q_len, :kv_len]
