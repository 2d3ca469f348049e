"""Sets of whole numbers as ascending, disjoint, half-open ranges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Reach:
    """What is known of the keys that a run of neighbouring queries sees: ``all`` of them see these, ``some`` may see those.

    Keys outside ``some`` are hidden from every query of the run; between the two, it has to be looked at.
    """

    all: Ranges
    some: Ranges

    @staticmethod
    def between(start: int, stop: int, sure_start: int, sure_stop: int) -> Reach:
        """One range each; an empty one where the start is not before the stop."""
        return Reach(all=merged([(sure_start, sure_stop)]), some=merged([(start, stop)]))

    def __and__(self, other: Reach) -> Reach:
        return Reach(common(self.all, other.all), common(self.some, other.some))

    def __or__(self, other: Reach) -> Reach:
        return Reach(merged(self.all + other.all), merged(self.some + other.some))

    def outside(self, length: int) -> Reach:
        """The reach of the complement among ``length`` keys."""
        everything = ((0, length),)
        return Reach(all=without(everything, self.some), some=without(everything, self.all))

    def moved(self, by: int) -> Reach:
        """The reach of keys that stand ``by`` positions later."""
        return Reach(*(tuple((start + by, stop + by) for start, stop in ranges) for ranges in (self.all, self.some)))


def stepped(first: int, last: int, step: int, low: int, high: int, length: int) -> Ranges:
    """The numbers ``first`` to ``last`` moved by ``step`` times every number from ``low`` to ``high``, below ``length``.

    One range where the moved copies touch each other.
    """
    low, high = max(low, -(last // step)), min(high, (length - 1 - first) // step)
    if step <= last - first + 1:
        return merged([(first + low * step, last + high * step + 1)])
    return tuple((first + step * n, last + step * n + 1) for n in range(low, high + 1))


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union: empty ranges left out, neighbours joined."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def common(a: Ranges, b: Ranges) -> Ranges:
    return merged((max(s, t), min(e, f)) for s, e in a for t, f in b)


def without(a: Ranges, b: Ranges) -> Ranges:
    """The numbers of ``a`` that are not in ``b``."""
    left = list(a)
    for start, stop in b:
        left = [piece for s, e in left for piece in ((s, min(e, start)), (max(s, stop), e)) if piece[0] < piece[1]]
    return tuple(left)


def clipped(ranges: Ranges, length: int) -> Ranges:
    """Only what lies within 0 and ``length``."""
    return common(merged(ranges), ((0, length),))
