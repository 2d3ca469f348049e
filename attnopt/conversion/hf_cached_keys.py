"""Keys on their way from a cache layer, through the user's class, to the attention function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class Source:
    """The ``layer`` of the cache that returned keys [B, G, S, D].

    ``parts``: (keys, values) of heads stored apart, whose numbers of tokens differ.  The keys themselves then have the shape
    that a full cache would return, and only NaN in them.
    """

    layer: DynamicLayer
    parts: Sequence[tuple[Tensor, Tensor]] = ()


def with_source(keys: Tensor, source: Source) -> Tensor:
    """The same keys, which know where they come from.  The result of any operation on them does not: a class that computes with
    cached keys hands the attention function keys without a source."""
    made: Any = keys.view_as(keys)
    made.attnopt_source = source
    return made  # type: ignore[no-any-return]


def source_of(keys: Tensor) -> Source | None:
    return getattr(keys, "attnopt_source", None)
