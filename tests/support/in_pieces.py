"""A decoder of transformers that reads a text in several calls."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor


def in_pieces(
    made: Any, ids: Tensor, stops: list[int], padding: Tensor | None = None, cache: Any = None
) -> tuple[Tensor, Any]:
    """The logits of all tokens, read up to each of ``stops`` in turn, and the cache."""
    cache = transformers.DynamicCache(config=made.config) if cache is None else cache
    start, pieces = 0, []
    with torch.no_grad():
        for stop in stops:
            options: dict[str, Any] = {}
            if padding is not None:
                positions = (padding.cumsum(-1) - 1).clamp(min=0)
                options = {"attention_mask": padding[:, :stop], "position_ids": positions[:, start:stop]}
            pieces.append(made(ids[:, start:stop], past_key_values=cache, **options).logits)
            start = stop
    return torch.cat(pieces, 1), cache
