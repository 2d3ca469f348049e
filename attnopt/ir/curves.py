"""Many numbers for each head of one attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True)
class Curves:
    """For each head, in the order of ``site.spec.heads``, a number at each of ``at``, positions along ``axis``."""

    axis: str  # with its unit: "distance in tokens"
    at: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.at) for row in self.values):
            raise ValueError(
                f"curves of {sorted({len(row) for row in self.values})} numbers at {len(self.at)} positions"
            )

    @classmethod
    def of(cls, axis: str, at: Sequence[float], values_HN: Tensor) -> Self:
        return cls(axis, tuple(map(float, at)), tuple(tuple(row) for row in values_HN.tolist()))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {"axis": self.axis, "at": list(self.at), "values": [list(row) for row in self.values]}
