"""A window that grows with the sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnopt.base.intervals import Reach
from attnopt.base.options import number, whole
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.sequence import Window

UNITS = 1000  # of a share: lengths stay whole numbers, also symbolic ones


@dataclass(frozen=True, repr=False)
class Span(Pattern):
    """Query i sees ``left + before * S`` keys before it and ``right + after * S`` after it, itself too, where S is the number
    of keys and shares of it are rounded down (MoA, arXiv:2406.14909).

    ``before``, ``after``: from 0 to 1, in thousandths.  Raises PolicyError.
    """

    left: int
    right: int
    before: float
    after: float = 0.0

    def __post_init__(self) -> None:
        whole("Span", "left", self.left)
        whole("Span", "right", self.right)
        for name, share in (("before", self.before), ("after", self.after)):
            object.__setattr__(self, name, thousandths("Span", name, share) / UNITS)

    @property
    def is_causal(self) -> bool:
        return self.right == 0 and self.after == 0

    @property
    def reads_length(self) -> bool:
        return True

    def at_length(self, kv_len: int) -> Pattern:
        return _Reaching(self.left + _share(kv_len, self.before), self.right + _share(kv_len, self.after))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        raise TypeError(f"{self} depends on the length of the sequence; use mask() or at_length()")

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return self.at_length(kv_len).reach(first, last, kv_len)


def thousandths(owner: str, option: str, share: object) -> int:
    """A share from 0 to 1 in thousandths, which it must be a whole number of."""
    exact = number(owner, option, share) * UNITS
    found = round(exact)
    if 0 <= found <= UNITS and abs(found - exact) < 1e-6:
        return found
    raise PolicyError(f"{owner}: invalid value {option}={share!r}: expected thousandths from 0 to 1, such as 0.125")


def _share(length: int, share: float) -> int:
    return length * round(share * UNITS) // UNITS


class _Reaching(Window):
    """A window whose numbers may be symbolic, so that it has no hash by value."""

    def __init__(self, left: int, right: int) -> None:
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)

    __eq__ = object.__eq__
    __hash__ = object.__hash__
