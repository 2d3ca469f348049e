"""Some queries and some keys of a longer sequence: what one process of several computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from attnopt.base.intervals import Ranges, Reach, as_text, common, from_text, merged
from attnopt.base.options import whole
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import Pattern


@dataclass(frozen=True, repr=False, init=False)
class Part(Pattern):
    """The pairs that ``pattern`` has between the queries and the keys at these positions of a sequence of ``length`` tokens; both
    are numbered anew, in their order.

    ``queries``, ``keys``: texts such as "4-7, 12", or ranges.  A call has exactly that many of each.  Raises PolicyError.
    """

    pattern: Pattern
    queries: Ranges
    keys: Ranges
    length: int

    def __init__(self, pattern: Pattern, queries: str | Ranges, keys: str | Ranges, length: int) -> None:
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "length", whole("Part", "length", length, least=1))
        for name, given in (("queries", queries), ("keys", keys)):
            found = from_text(given) if isinstance(given, str) else merged(given)
            if not found or found[-1][1] > length:
                raise PolicyError(
                    f'Part: invalid value {name}={given!r}: expected positions below {length}, such as "0-3, 7"'
                )
            object.__setattr__(self, name, found)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    @property
    def is_positional(self) -> bool:
        return True

    @property
    def reads_length(self) -> bool:
        return False

    @property
    def lengths(self) -> None:
        return None

    def order(self, q_len: int) -> None:
        return None

    def for_head(self, place: int) -> Pattern:
        return Part(self.pattern.for_head(place), self.queries, self.keys, self.length)

    def for_heads(self, places: Sequence[int]) -> Pattern:
        return Part(self.pattern.for_heads(places), self.queries, self.keys, self.length)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        queries, keys = _placed(i - self._offset, self.queries), _placed(j, self.keys)
        return self.pattern.at_length(self.length).visible(queries, keys)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        own = _those(self.queries, first - self._offset, last - self._offset + 1)
        found = [self.pattern.reach(start, stop - 1, self.length) for start, stop in own]
        if not found:
            return Reach((), ())
        sure = reduce(common, (r.all for r in found))
        return Reach(all=self._renumbered(sure), some=self._renumbered(merged(k for r in found for k in r.some)))

    @property
    def _offset(self) -> int:
        """The last query is aligned with the last key."""
        return count(self.keys) - count(self.queries)

    def _renumbered(self, seen: Ranges) -> Ranges:
        found, before = list[tuple[int, int]](), 0
        for start, stop in self.keys:
            found += [(a - start + before, b - start + before) for a, b in common(seen, ((start, stop),))]
            before += stop - start
        return merged(found)

    def __repr__(self) -> str:
        return f"Part({self.pattern!r}, {as_text(self.queries)!r}, {as_text(self.keys)!r}, {self.length})"


def count(ranges: Ranges) -> int:
    """How many numbers there are."""
    return sum(stop - start for start, stop in ranges)


def _placed(numbers: Tensor, ranges: Ranges) -> Tensor:
    """The numbers at these places of ``ranges``."""
    (start, stop), *others = ranges
    before, found = stop - start, numbers + start
    for start, stop in others:
        found = found.where(numbers < before, numbers - before + start)
        before += stop - start
    return found


def _those(ranges: Ranges, first: int, end: int) -> Ranges:
    """The numbers of ``ranges`` at the places ``first`` up to ``end``."""
    found, before = list[tuple[int, int]](), 0
    for start, stop in ranges:
        a, b = max(first - before, 0) + start, min(end - before, stop - start) + start
        found += [(a, b)] if a < b else []
        before += stop - start
    return tuple(found)
