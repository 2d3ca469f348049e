"""A transformers cache layer that drops the keys which received the least attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d
from transformers.cache_utils import DynamicLayer

from attnopt.conversion.hf_cached_keys import Source, with_source
from attnopt.errors import AttnoptError
from attnopt.ir.eviction import Eviction


class EvictingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, G, S, D] of the tokens at ``positions`` [B, G, S], in their order, which differ by head.

    The attention function calls ``evict`` with the attention that each key received.  Keys are kept as they come: rotary
    positions are those that the tokens had.
    """

    is_croppable = False

    def __init__(self, eviction: Eviction) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.eviction = eviction
        self.cumulative_length = 0  # all tokens that were ever added
        self.positions: Tensor | None = None
        self.received: Tensor | None = None  # [B, G, S], so far; "h2o" only
        self._is_waiting = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The kept and the new keys, with their source, and their values."""
        if self._is_waiting:
            raise AttnoptError(
                "the class computes with cached keys before its attention, which cannot say which of them to evict",
                hint="exclude the layer from evict-keys",
            )
        self._is_waiting = True
        B, G, added = key_states.shape[:3]
        new = torch.arange(self.cumulative_length, self.cumulative_length + added, device=key_states.device)
        kept = [] if self.positions is None else [self.positions]
        self.positions = torch.cat([*kept, new.expand(B, G, added)], dim=-1)
        self.cumulative_length += added
        keys, values = super().update(key_states, value_states)
        return with_source(keys, Source(self)), values

    @property
    def is_whole(self) -> bool:
        """Nothing was dropped yet."""
        return self.positions is None or self.positions.shape[-1] == self.cumulative_length

    def voters(self, new: int) -> int:
        """How many of the newest queries of a call with ``new`` tokens say which keys to keep."""
        if self.eviction.method == "h2o":
            return new
        return min(self.eviction.recent, new) if new > 1 else 0

    def evict(self, votes: Tensor, new: int) -> None:
        """Keep as many keys as the budget allows, after a call with ``new`` tokens.

        ``votes`` [B, G, S]: the attention that each held key received in the call.
        """
        assert self.positions is not None, "a call adds keys first"
        self._is_waiting = False
        budget, recent, held = self.eviction.budget, self.eviction.recent, votes.shape[-1]
        if self.eviction.method == "h2o":
            if self.received is not None:
                votes[..., : self.received.shape[-1]] += self.received
            self.received = votes
            budget, recent = budget - 1, recent - 1  # the next query brings its own key
        elif not self.voters(new):
            return
        if held <= budget:
            return
        earlier = votes[..., : held - recent]
        if self.eviction.pool > 1:
            around = max_pool1d(earlier, self.eviction.pool, stride=1, padding=self.eviction.pool // 2)
            earlier = around.masked_fill(earlier == 0, 0.0)  # padding, seen by nothing, has no part in a vote beside it
        best = earlier.sort(dim=-1, descending=True, stable=True).indices[..., : budget - recent]
        newest = torch.arange(held - recent, held, device=votes.device).expand(*votes.shape[:2], recent)
        self._keep(torch.cat([best.sort(dim=-1).values, newest], dim=-1))

    def _keep(self, index: Tensor) -> None:
        assert self.positions is not None, "keys are dropped only where there are some"
        self.positions = self.positions.gather(-1, index)
        self.received = None if self.received is None else self.received.gather(-1, index)
        there = index.to(self.keys.device).unsqueeze(-1)
        self.keys, self.values = (
            t.gather(-2, there.expand(*index.shape, t.shape[-1])) for t in (self.keys, self.values)
        )

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Raises RuntimeError: what the tokens made the cache drop does not come back."""
        if tokens_to_remove:
            raise RuntimeError(
                "a cache that evicts keys cannot remove tokens, so a model with evict-keys cannot use an assistant model"
            )

    def reset(self) -> None:
        super().reset()
        self.positions = self.received = None
        self._is_waiting = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self._select(torch.arange(self.positions.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        self.positions, self.received = (
            None if t is None else t[rows.to(t.device)] for t in (self.positions, self.received)
        )
