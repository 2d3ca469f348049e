"""Which of several attentions, by their order: ``2``, ``[0, -1]``, or a slice such as ``"2:-2"``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from attnopt.base.options import whole_tuple
from attnopt.errors import PolicyError

_NUMBER = r"\s*(-?\d{1,9})?\s*"
_SLICE = re.compile(f"{_NUMBER}:{_NUMBER}(?::{_NUMBER})?")
_LARGEST = 10**9


@dataclass(frozen=True)
class LayerOrder:
    """The places in ``numbers``, or the slice ``start:stop:step``.  Below 0 they count from the end."""

    numbers: tuple[int, ...] | None = None
    start: int | None = None
    stop: int | None = None
    step: int | None = None

    @classmethod
    def of(cls, owner: str, given: object) -> LayerOrder:
        """Raises PolicyError."""
        if isinstance(given, LayerOrder):
            return given
        if isinstance(given, str) and (read := _SLICE.fullmatch(given)):
            given = slice(*(int(n) if n else None for n in read.groups()))
        if isinstance(given, slice):
            ends = [given.start, given.stop, given.step]
            if all(e is None or (type(e) is int and abs(e) < _LARGEST) for e in ends) and given.step != 0:
                return cls(None, *ends)
        elif not isinstance(given, str):
            return cls(whole_tuple(owner, "layers", given, None, least=-_LARGEST))
        raise PolicyError(
            f"{owner}: invalid value layers={given!r}: expected integers or a slice",
            hint='write 2, [0, -1], slice(2, -2) or "2:-2"',
        )

    def places(self, owner: str, count: int) -> tuple[int, ...]:
        """Of ``count`` attentions.  Raises PolicyError for a number that there is not."""
        if self.numbers is None:
            return tuple(range(count)[self.start : self.stop : self.step])
        outside = [n for n in self.numbers if not -count <= n < count]
        if outside:
            raise PolicyError(
                f"{owner}: there is no layer {', '.join(map(str, outside))}: {count} attentions meet the other conditions",
                hint="layers are counted from 0 among these, and from -1 back",
            )
        return tuple(sorted({n % count for n in self.numbers}))

    def __repr__(self) -> str:
        """As it is written in a condition."""
        if self.numbers is not None:
            return repr(self.numbers[0] if len(self.numbers) == 1 else list(self.numbers))
        start, stop, step = ("" if n is None else str(n) for n in (self.start, self.stop, self.step))
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
