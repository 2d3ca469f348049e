"""A transformers cache layer in which heads that see less of the past are stored apart from those that see more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attnopt.conversion.head_groups import HeadGroup
from attnopt.conversion.hf_cache import RollingLayer
from attnopt.conversion.hf_cached_keys import Source, with_source


class HeadGroupsLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of each group of heads in a layer of its own: all tokens, or the first and the recent ones.

    The attention function calls ``split`` on the first keys that it receives from this layer.  Until then everything is kept,
    as for a class that computes with cached keys before it calls the function.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.groups: tuple[HeadGroup, ...] = ()
        self.layers: tuple[DynamicLayer, ...] = ()  # one for each group
        self._records = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys with their source, and values."""
        if not self.layers:
            keys, values = super().update(key_states, value_states)
            return with_source(keys, Source(self)), values
        parts = self._updated(key_states, value_states)
        length = self.get_seq_length()
        keys, values = (_nowhere(t, length) for t in (key_states, value_states))
        return with_source(keys, Source(self, parts)), values

    def split(self, keys: Tensor, values: Tensor, groups: Sequence[HeadGroup]) -> list[tuple[Tensor, Tensor]]:
        """The keys and values [B, heads of the group, S, D] of each group; from now on they are stored apart."""
        self.groups = tuple(groups)
        self.layers = tuple(DynamicLayer() if g.past is None else RollingLayer(g.past) for g in groups)
        if self._records:
            self.activate_past_recording()
        self.keys = self.values = None
        return self._updated(keys, values)

    def _updated(self, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        apart = zip(self.groups, self.layers, strict=True)
        return [layer.update(keys[:, list(g.kv_heads)], values[:, list(g.kv_heads)]) for g, layer in apart]

    def get_seq_length(self) -> int:
        return int(self.layers[0].get_seq_length() if self.layers else super().get_seq_length())

    @property
    def record_past(self) -> bool:
        return self._records

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._records = value
        for layer in self._rolling():
            layer.record_past = value

    def activate_past_recording(self) -> None:
        """Keep everything until ``crop`` is called, as in each ``RollingLayer``."""
        self._records = True
        for layer in self._rolling():
            layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens of all heads, or of none."""
        if not self.layers:
            super().crop(tokens_to_remove)
            return
        for layer in self._rolling():
            layer.require_removable(-tokens_to_remove)
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.groups = self.layers = ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self._stored():
            DynamicLayer.reorder_cache(layer, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self._stored():
            DynamicLayer.batch_repeat_interleave(layer, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self._stored():
            DynamicLayer.batch_select_indices(layer, indices)

    def offload(self) -> None:
        for layer in self._stored():
            DynamicLayer.offload(layer)

    def prefetch(self) -> None:
        for layer in self._stored():
            DynamicLayer.prefetch(layer)

    def _stored(self) -> tuple[DynamicLayer, ...]:
        """The layers that hold tensors."""
        return self.layers or (self,)

    def _rolling(self) -> list[RollingLayer]:
        return [layer for layer in self.layers if isinstance(layer, RollingLayer)]


def _nowhere(new: Tensor, length: int) -> Tensor:
    """NaN in the shape [B, G, length, D], from one number."""
    return torch.full((), torch.nan, dtype=new.dtype, device=new.device).expand(*new.shape[:2], length, new.shape[3])
