"""How good picks are, each measured once on each piece of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attnopt.policy_search.menu import Picks

Part = tuple[float, float]  # a sum, and what it is to be divided by
Measure = Callable[[Picks, Sequence[int]], Sequence[Part]]  # of these picks on the pieces of these numbers
Known = dict[Picks, dict[int, Part]]


class EndError(Exception):
    """No time, or no evaluation, is left."""


@dataclass
class Judge:
    """``known``: what was measured already, by picks and piece; ``saved`` is called after each measurement, ``told`` when picks
    are judged on all pieces.

    ``spent`` counts measurements on all pieces; those on some count by their share, and those that were known count too, so
    that a search that is resumed goes the way that it would have gone.  ``limit``: how many there may be; ``is_late``: no time is
    left.  Neither holds before ``is_limited`` is set.  ``together``: how many pieces are measured at a time.
    """

    measure: Measure
    pieces: int
    known: Known = field(default_factory=dict)
    limit: float = float("inf")
    is_late: Callable[[], bool] = lambda: False
    saved: Callable[[], None] = lambda: None
    told: Callable[[], None] = lambda: None
    together: int = 1
    is_limited: bool = False
    asked: set[tuple[Picks, int]] = field(default_factory=set)
    full: dict[Picks, float] = field(default_factory=dict)  # the values on all pieces, in the order of measurement

    @property
    def spent(self) -> float:
        return len(self.asked) / self.pieces

    def values(self, candidates: Sequence[Picks], pieces: int | None = None) -> list[float]:
        """The mean of each on the first ``pieces`` pieces; on all by default.  Raises EndError."""
        return [self.value(picks, pieces) for picks in candidates]

    def value(self, picks: Picks, pieces: int | None = None) -> float:
        """As ``values``, of one."""
        count = self.pieces if pieces is None else pieces
        self._measure(picks, count)
        found = self._mean(picks, count)
        if count == self.pieces and picks not in self.full:
            self.full[picks] = found
            self.told()
        return found

    def recall(self) -> None:
        """Count what was known on all pieces before."""
        for picks, parts in self.known.items():
            if len(parts) == self.pieces:
                self.full.setdefault(picks, self._mean(picks, self.pieces))

    def _measure(self, picks: Picks, count: int) -> None:
        known = self.known.setdefault(picks, {})
        wanted = [piece for piece in range(count) if (picks, piece) not in self.asked]
        while wanted:
            some, wanted = wanted[: self.together], wanted[self.together :]
            allowed = some[: self._room()]
            if missing := [piece for piece in allowed if piece not in known]:
                known.update(zip(missing, self.measure(picks, missing), strict=True))
                self.saved()
            self.asked.update((picks, piece) for piece in allowed)
            if len(allowed) < len(some):
                raise EndError

    def _room(self) -> int:
        """How many more pieces may be measured, of those that are measured together."""
        if not self.is_limited:
            return self.together
        if self.is_late():
            return 0
        left = self.limit * self.pieces - len(self.asked)
        return self.together if left >= self.together else max(0, math.ceil(left))

    def _mean(self, picks: Picks, count: int) -> float:
        parts = [self.known[picks][piece] for piece in range(count)]
        return sum(total for total, _ in parts) / sum(n for _, n in parts)
