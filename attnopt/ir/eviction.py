"""Which keys the cache of a decoder drops, by the attention that they received."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Eviction:
    """A bound on the keys that each key/value head keeps while a model decodes from a cache, which drops the others for good.

    Without a cache nothing is dropped: over the keys of one call, the attention is what it is without eviction.

    ``method``:
      - "h2o": after each call, the keys that received the most attention from all queries so far (H2O, arXiv:2306.14048).
        A query of one token sees ``budget`` keys, ``recent`` of them the newest, itself included.
      - "snapkv": after each call of several tokens, the keys that received the most from its last ``recent`` queries, and
        these (SnapKV, arXiv:2404.14469): ``budget`` keys in all.  Single tokens that follow are added and never dropped.
        A key counts what the best of ``pool`` keys around it received; nothing if these queries do not see it, as padding.
    """

    method: str
    budget: int
    recent: int
    pool: int = 1

    def __str__(self) -> str:
        pool = "" if self.method == "h2o" else f", pool={self.pool}"
        return f"cache evicted by {self.method} (budget={self.budget}, recent={self.recent}{pool})"

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)
