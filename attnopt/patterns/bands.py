"""Bands of pairs: patterns that need neither a mask nor the length to say which keys a run of queries sees."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

MANY = 16  # more bands are not worth it


@dataclass(frozen=True)
class Band:
    """Query position i sees key j if ``low <= j - i <= high``, ``(j - i) % step == 0`` and ``j < first``."""

    low: int | None = None
    high: int | None = None
    step: int = 1
    first: int | None = None

    def __and__(self, other: Band) -> Band:
        return Band(
            max(self.low, other.low, key=_as_low),
            min(self.high, other.high, key=_as_high),
            math.lcm(self.step, other.step),
            min(self.first, other.first, key=_as_high),
        )

    def __le__(self, other: Band) -> bool:
        """Every pair of this band is in the other."""
        return (self & other) == self


Bands = tuple[Band, ...]


def union(parts: Iterable[Bands | None]) -> Bands | None:
    """The union as bands, none inside another; None if there are too many, or an operand is unknown."""
    kept: list[Band] = []
    for part in parts:
        if part is None:
            return None
        for band in part:
            if not any(band <= other for other in kept):
                kept = [other for other in kept if not other <= band] + [band]
    return tuple(kept) if len(kept) <= MANY else None


def intersection(parts: Iterable[Bands | None]) -> Bands | None:
    """The intersection, as in ``union``."""
    found: Bands | None = (Band(),)
    for part in parts:
        if part is None or found is None:
            return None
        found = union([tuple(a & b for a, b in product(found, part))])
    return found


def _as_low(bound: int | None) -> float:
    return -math.inf if bound is None else bound


def _as_high(bound: int | None) -> float:
    return math.inf if bound is None else bound
