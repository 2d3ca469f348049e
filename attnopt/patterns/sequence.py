"""The patterns over one-dimensional sequences.

Below, "query i" is the query at position i; with fewer queries than keys, the last query is aligned with the last key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attnopt.base.intervals import Ranges, Reach, as_text, from_text, merged, stepped, up
from attnopt.base.options import LARGEST, whole, wholes
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.bands import Band, Bands
from attnopt.patterns.edges import outside
from attnopt.patterns.lookback import Past


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """Query i sees keys up to i, including itself."""

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def bands(self) -> Bands:
        return (Band(high=0),)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return Reach.between(0, last + 1, 0, first + 1)


@dataclass(frozen=True, repr=False, init=False)
class Window(Pattern):
    """Query i sees keys ``i - left`` to ``i + right``, including itself; ``right=None`` means ``left``."""

    left: int
    right: int

    def __init__(self, left: int, right: int | None = None) -> None:
        object.__setattr__(self, "left", whole("Window", "left", left))
        object.__setattr__(self, "right", left if right is None else whole("Window", "right", right))

    @property
    def is_causal(self) -> bool:
        return self.right == 0

    @property
    def look_back(self) -> Past:
        return Past(0, self.left)

    @property
    def bands(self) -> Bands:
        return (Band(-self.left, self.right),)

    def neighbours(self, tile: tuple[int, ...]) -> Iterator[Pattern]:
        yield Window(up(self.left, tile[0]), self.right and up(self.right, tile[0]))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (j >= i - self.left) & (j <= i + self.right)

    def beyond(self, i: Tensor, kv_len: int) -> Tensor:
        return outside(i - self.left, self.left + self.right + 1, kv_len)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return Reach.between(first - self.left, last + self.right + 1, last - self.left, first + self.right + 1)


@dataclass(frozen=True, repr=False)
class Dilated(Pattern):
    """Query i sees keys ``i + dilation * step`` for each step from ``-left`` to ``right``."""

    left: int
    right: int
    dilation: int

    def __post_init__(self) -> None:
        whole("Dilated", "left", self.left)
        whole("Dilated", "right", self.right)
        whole("Dilated", "dilation", self.dilation, least=1)

    @property
    def is_causal(self) -> bool:
        return self.right == 0

    @property
    def look_back(self) -> Past:
        return Past(0, self.left * self.dilation)

    @property
    def bands(self) -> Bands:
        return (Band(-self.left * self.dilation, self.right * self.dilation, self.dilation),)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        ahead = j - i
        near = (ahead >= -self.left * self.dilation) & (ahead <= self.right * self.dilation)
        return near & (ahead % self.dilation == 0)

    def order(self, q_len: int) -> NDArray[np.int64]:
        return _by_remainder(q_len, self.dilation)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return Reach(all=(), some=stepped(first, last, self.dilation, -self.left, self.right, kv_len))


@dataclass(frozen=True, repr=False)
class Sinks(Pattern):
    """The first ``n`` keys are visible to every query (StreamingLLM, arXiv:2309.17453)."""

    n: int

    def __post_init__(self) -> None:
        whole("Sinks", "n", self.n)

    @property
    def is_positional(self) -> bool:
        return False

    @property
    def look_back(self) -> Past:
        return Past(self.n, 0)

    @property
    def bands(self) -> Bands:
        return (Band(first=self.n),)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i == i) & (j < self.n)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return Reach.between(0, self.n, 0, self.n)


@dataclass(frozen=True, repr=False, init=False)
class Keys(Pattern):
    """The keys at these positions are visible to every query: a segment of the sequence, such as an image.

    ``positions``: a range, other integers, or a text such as "0-3, 7".  Raises PolicyError.
    """

    positions: Ranges

    def __init__(self, positions: str | Iterable[int]) -> None:
        if isinstance(positions, str):
            found = from_text(positions)
            if found is None:
                raise PolicyError(f'Keys: invalid value positions={positions!r}: expected positions such as "0-3, 7"')
        elif isinstance(positions, range) and positions.step == 1 and positions.start >= 0:
            found = merged([(positions.start, positions.stop)])
        else:
            found = merged((p, p + 1) for p in wholes("Keys", "positions", positions))
        if found:
            whole("Keys", "positions", found[-1][1])
        object.__setattr__(self, "positions", found)

    @property
    def is_positional(self) -> bool:
        return False

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        seen = (i != i) | (j != j)
        for start, stop in self.positions:
            seen = seen | ((j >= start) & (j < stop))
        return seen

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return Reach(all=self.positions, some=self.positions)

    def __repr__(self) -> str:
        return f"Keys({as_text(self.positions)!r})"


@dataclass(frozen=True, repr=False)
class Global(Pattern):
    """The tokens at these positions are visible to all and see all (Longformer, arXiv:2004.05150)."""

    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", wholes("Global", "positions", self.positions))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        seen = (i != i) | (j != j)
        for _, run in groupby(enumerate(self.positions), key=lambda pair: pair[1] - pair[0]):
            places = [position for _, position in run]
            seen = seen | ((i >= places[0]) & (i <= places[-1])) | ((j >= places[0]) & (j <= places[-1]))
        return seen

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        seen = merged((p, p + 1) for p in self.positions)
        everything = ((0, kv_len),)
        touched = any(start <= last and first < stop for start, stop in seen)
        covered = any(start <= first and last < stop for start, stop in seen)
        return Reach(all=everything if covered else seen, some=everything if touched else seen)


@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    """Query i sees keys j with ``(i - j) % stride == 0``, on both sides (Sparse Transformer, arXiv:1904.10509)."""

    stride: int

    def __post_init__(self) -> None:
        whole("Strided", "stride", self.stride, least=1)

    @property
    def bands(self) -> Bands:
        return (Band(step=self.stride),)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j) % self.stride == 0

    def order(self, q_len: int) -> NDArray[np.int64]:
        return _by_remainder(q_len, self.stride)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return Reach(all=(), some=stepped(first, last, self.stride, -LARGEST, LARGEST, kv_len))


@dataclass(frozen=True, repr=False)
class Periodic(Pattern):
    """Every query sees the keys j with ``start <= j % period < start + count``."""

    period: int
    start: int
    count: int = 1

    def __post_init__(self) -> None:
        whole("Periodic", "period", self.period, least=1)
        whole("Periodic", "start", self.start)
        whole("Periodic", "count", self.count)
        if self.start + self.count > self.period:
            raise PolicyError(f"Periodic: start={self.start} and count={self.count} exceed period={self.period}")

    @property
    def is_positional(self) -> bool:
        return False

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        place = j % self.period
        return (i == i) & (place >= self.start) & (place < self.start + self.count)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        if not self.count:
            return Reach((), ())
        seen = stepped(self.start, self.start + self.count - 1, self.period, 0, LARGEST, kv_len)
        return Reach(all=seen, some=seen)


def _by_remainder(length: int, divisor: int) -> NDArray[np.int64]:
    """Indices 0 to ``length``, grouped by remainder."""
    return np.argsort(np.arange(length) % divisor, kind="stable")
