"""Sets of integers as ascending, disjoint, half-open ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Reach:
    """The keys that a run of neighbouring queries sees: ``all`` of them see these, ``some`` may see those.

    Keys outside ``some`` are hidden from every query of the run; those in between must be evaluated.
    """

    all: Ranges
    some: Ranges

    @staticmethod
    def between(start: int, stop: int, sure_start: int, sure_stop: int) -> Reach:
        """One range each; empty if the start is not before the stop."""
        sure = ((sure_start, sure_stop),) if sure_start < sure_stop else ()
        return Reach(all=sure, some=((start, stop),) if start < stop else ())

    def __and__(self, other: Reach) -> Reach:
        return Reach(common(self.all, other.all), common(self.some, other.some))

    def __or__(self, other: Reach) -> Reach:
        return Reach(merged(self.all + other.all), merged(self.some + other.some))

    def outside(self, length: int) -> Reach:
        """The reach of the complement among ``length`` keys."""
        everything = ((0, length),)
        return Reach(all=without(everything, self.some), some=without(everything, self.all))

    def moved(self, by: int) -> Reach:
        """The reach with the keys moved by ``by`` positions."""
        return Reach(*(tuple((start + by, stop + by) for start, stop in ranges) for ranges in (self.all, self.some)))


def stepped(first: int, last: int, step: int, low: int, high: int, length: int) -> Ranges:
    """The numbers ``first`` to ``last`` moved by ``step`` times every number from ``low`` to ``high``, below ``length``.

    One range if the moved copies touch.
    """
    low, high = max(low, -(last // step)), min(high, (length - 1 - first) // step)
    if step <= last - first + 1:
        return merged([(first + low * step, last + high * step + 1)])
    return tuple((first + step * n, last + step * n + 1) for n in range(low, high + 1))


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union of any ranges: empty ones left out, neighbours joined."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            if stop > found[-1][1]:
                found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def common(a: Ranges, b: Ranges) -> Ranges:
    """The numbers that are in both."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            found.append((start, stop))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def without(a: Ranges, b: Ranges) -> Ranges:
    """The numbers of ``a`` that are not in ``b``."""
    found: list[tuple[int, int]] = []
    j = 0
    for start, stop in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        k = j
        while k < len(b) and b[k][0] < stop:
            if start < b[k][0]:
                found.append((start, b[k][0]))
            start = b[k][1]
            k += 1
        if start < stop:
            found.append((start, stop))
    return tuple(found)


def clipped(ranges: Ranges, length: int) -> Ranges:
    """Only what lies within 0 and ``length``."""
    if ranges and ranges[0][0] >= 0 and ranges[-1][1] <= length:
        return ranges
    return common(ranges, ((0, length),))


def up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step


def from_text(text: str) -> Ranges | None:
    """The numbers that a text such as "0-3, 7" lists; None if it is none."""
    listed = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch(r"\d{1,10}(-\d{1,10})?", part) for part in listed):
        return None
    return merged((int(a), int(b or a) + 1) for a, _, b in (part.partition("-") for part in listed))


def as_text(ranges: Ranges) -> str:
    """The inverse of ``from_text``."""
    return ",".join(str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in ranges)
