"""Keys on their way from a cache layer, through the user's class, to the attention function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class CachedKeys(Tensor):
    """Keys [B, G, S, D] that know the ``layer`` of the cache that returned them.  The result of any operation on them is a
    plain tensor: a class that computes with cached keys hands the attention function keys without a layer.

    ``parts``: (keys, values) of heads stored apart, whose numbers of tokens differ.  The tensor itself then has the shape that
    a full cache would return, and only NaN in it.
    """

    layer: DynamicLayer
    parts: Sequence[tuple[Tensor, Tensor]]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, keys: Tensor, layer: DynamicLayer, parts: Sequence[tuple[Tensor, Tensor]] = ()) -> Self:
        made: Any = keys.as_subclass(cls)
        made.layer, made.parts = layer, parts
        return made  # type: ignore[no-any-return]
