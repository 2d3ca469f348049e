"""Patterns as unions of bands, which need no mask and no length to say which keys a run of queries sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

from attnopt.patterns import And, Causal, Dilated, Full, Or, Pattern, Sinks, Strided, Window

_MANY = 16  # bands that are worth telling apart


@dataclass(frozen=True)
class Band:
    """Query position i sees key j where ``low <= j - i <= high``, ``(j - i) % step == 0`` and ``j < first``."""

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
        """Every pair of this band is one of the other's."""
        return (self & other) == self


def _as_low(bound: int | None) -> float:
    return -math.inf if bound is None else bound


def _as_high(bound: int | None) -> float:
    return math.inf if bound is None else bound


def bands(pattern: Pattern) -> tuple[Band, ...] | None:
    """Bands whose union is ``pattern``, none inside another; None where there are none, or too many."""
    found = _bands(pattern)
    if found is None or len(found) > _MANY:
        return None
    kept: list[Band] = []
    for band in found:
        if not any(band <= other for other in kept):
            kept = [other for other in kept if not other <= band] + [band]
    return tuple(kept)


def _bands(pattern: Pattern) -> tuple[Band, ...] | None:
    match pattern:
        case Full():
            return (Band(),)
        case Causal():
            return (Band(high=0),)
        case Window(left=left, right=right):
            return (Band(-left, right),)
        case Dilated(left=left, right=right, dilation=step):
            return (Band(-left * step, right * step, step),)
        case Strided(stride=step):
            return (Band(step=step),)
        case Sinks(n=n):
            return (Band(first=n),)
        case And() | Or():
            parts = [bands(part) for part in pattern.parts]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            if isinstance(pattern, Or):
                return tuple(band for part in known for band in part)
            return reduce(lambda a, b: tuple(x & y for x in a for y in b), known)
    return None
