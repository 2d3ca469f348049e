"""What a number has to be: ``12``, ``">0.8"``, ``"<=2"``, or ``(4, 8)`` for from 4 to 8."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf

from attnopt.base.options import number
from attnopt.errors import PolicyError

_TEXT = re.compile(r"\s*(>=|<=|>|<)\s*(\S+)\s*")
_EXACT = 2.0**53  # from here on not every integer is a float


@dataclass(frozen=True)
class Bound:
    """``low`` to ``high``, both included unless ``is_open``."""

    low: float = -inf
    high: float = inf
    is_open: bool = False

    @classmethod
    def of(cls, owner: str, option: str, given: object) -> Bound:
        """From a number, a pair of numbers, or text with a comparison.  Raises PolicyError."""
        if isinstance(given, Bound):
            return given
        if isinstance(given, str):
            return cls._of_text(owner, option, given)
        if not isinstance(given, (tuple, list)):
            exact = number(owner, option, given)
            return cls(exact, exact)
        if len(given) != 2 or (low := number(owner, option, given[0])) > (high := number(owner, option, given[1])):
            raise PolicyError(f"{owner}: invalid value {option}={given!r}: expected two numbers, the lower one first")
        return cls(low, high)

    @classmethod
    def _of_text(cls, owner: str, option: str, given: str) -> Bound:
        read = _TEXT.fullmatch(given)
        try:
            at = number(owner, option, float(read[2])) if read else None
        except (ValueError, PolicyError):
            at = None
        if read is None or at is None:
            raise PolicyError(
                f"{owner}: invalid value {option}={given!r}: expected a comparison",
                hint='write ">0.8", ">=0.8", "<2", "<=2", a number, or two for a range',
            )
        return cls(low=at, is_open=read[1] == ">") if read[1][0] == ">" else cls(high=at, is_open=read[1] == "<")

    def __contains__(self, value: float) -> bool:
        return self.low < value < self.high if self.is_open else self.low <= value <= self.high

    def __repr__(self) -> str:
        """As it is written in an option."""
        if self.low == self.high:
            return _shown(self.low)
        if self.low == -inf:
            return repr(f"<{'' if self.is_open else '='}{_shown(self.high)}")
        if self.high == inf:
            return repr(f">{'' if self.is_open else '='}{_shown(self.low)}")
        return f"({_shown(self.low)}, {_shown(self.high)})"


def _shown(value: float) -> str:
    return repr(int(value)) if value.is_integer() and abs(value) < _EXACT else repr(value)
