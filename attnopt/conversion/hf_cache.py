"""A transformers cache layer that keeps only what a pattern can still see: the first tokens and the recent ones."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attnopt.patterns.lookback import Past

SPARE = 64  # tokens of the last update that can be removed again


class RollingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, G, at most sinks + recent + SPARE, D] of the first tokens and the last ones.

    ``update`` returns those that new queries can see, followed by the new ones; memory does not grow with the number of
    tokens.  Keys are kept as they come: rotary positions are those that the tokens had.
    """

    is_croppable = False

    def __init__(self, past: Past) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.past = past
        self.cumulative_length = 0  # all tokens that were ever added
        self.record_past = False
        self._removable = 0  # tokens that `crop` can remove after something was dropped

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The kept and the new keys and values, [B, G, S, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        sinks, recent = self.past.sinks, self.past.recent
        keys, values = (
            torch.cat([*([old] if self.record_past else _ends(old, sinks, recent)), new], dim=-2)
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )
        added = key_states.shape[-2]
        self.cumulative_length += added
        if self.record_past or keys.shape[-2] <= sinks + recent + SPARE:
            self.keys, self.values = keys, values
            self._removable = self._removable + added if self.record_past else added
        else:  # copied, so dropped tokens are freed
            self.keys, self.values = (torch.cat(_ends(t, sinks, recent + SPARE), dim=-2) for t in (keys, values))
            self._removable = min(added, SPARE)
        return keys, values

    def activate_past_recording(self) -> None:
        """Keep everything until ``crop`` is called, which can then remove all tokens added in between."""
        self.record_past = True
        self._removable = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens, as assisted generation does after each of its steps."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove, as a negative number")
        if not self.is_initialized:
            return
        self.require_removable(-tokens_to_remove)
        if tokens_to_remove:
            self.keys, self.values = self.keys[..., :tokens_to_remove, :], self.values[..., :tokens_to_remove, :]
            self.cumulative_length += tokens_to_remove
        ends = (_ends(t, self.past.sinks, self.past.recent) for t in (self.keys, self.values))
        self.keys, self.values = (torch.cat(parts, dim=-2) for parts in ends)
        self._removable = 0

    def require_removable(self, tokens: int) -> None:
        """Raise RuntimeError if what was before the last ``tokens`` tokens is not known any more."""
        if self.is_initialized and self.keys.shape[-2] < self.cumulative_length and tokens > self._removable:
            raise RuntimeError(
                f"{tokens} tokens cannot be removed: the cache has already dropped earlier ones; "
                "a model with patterns can use an assistant model, but cannot be one"
            )

    def reset(self) -> None:
        super().reset()
        self._removable = 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As in a cache that keeps everything: masks cover all tokens, and are cut to the kept ones on use."""
        return self.cumulative_length + query_length, 0


def _ends(t: Tensor, sinks: int, recent: int) -> list[Tensor]:
    """The first and the last tokens of [.., S, D], as views; all of them if there are no more."""
    length = t.shape[-2] if t.dim() > 1 else 0  # empty before the first update
    return [t] if length <= sinks + recent else [t[..., :sinks, :], t[..., length - recent :, :]]
