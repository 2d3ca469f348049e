"""Blocks of neighbouring tokens with a halo of keys around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from attnopt.base.intervals import Reach
from attnopt.base.options import choice, whole
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.edges import outside

Position = TypeVar("Position", int, Tensor)


@dataclass(frozen=True, repr=False)
class Blocks(Pattern):
    """Query i sees the keys of its own block of ``size`` tokens, and ``halo`` keys on each side of it (HaloNet,
    arXiv:2103.12731).

    Blocks begin at position ``shift`` and every ``size`` tokens after it; with a shift, the first block is shorter.
    ``edge``: at both ends of the sequence, a block and its halo are clipped ("clip"), or moved inside, so that every query
    sees ``size + 2 * halo`` keys ("shift"; a shorter sequence is seen whole).
    """

    size: int
    halo: int = 0
    shift: int = 0
    edge: str = "clip"

    def __post_init__(self) -> None:
        whole("Blocks", "size", self.size, least=1)
        whole("Blocks", "halo", self.halo)
        if whole("Blocks", "shift", self.shift) >= self.size:
            raise PolicyError(f"Blocks: invalid value shift={self.shift}: expected a shift below size={self.size}")
        choice("Blocks", "edge", self.edge, ("clip", "shift"))

    @property
    def reads_length(self) -> bool:
        return self.edge == "shift"

    def at_length(self, kv_len: int) -> Pattern:
        return _Inside(self, kv_len) if self.reads_length else self

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        if self.reads_length:
            raise TypeError(f"{self} depends on the length of the sequence; use mask() or at_length()")
        start = self.start(i)
        return (j >= start) & (j < start + self.width)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        start, sure_start = self.start(first), self.start(last)
        if self.reads_length:
            start, sure_start = (max(0, min(n, kv_len - self.width)) for n in (start, sure_start))
        return Reach.between(start, sure_start + self.width, sure_start, start + self.width)

    def beyond(self, i: Tensor, kv_len: int) -> Tensor | None:
        return None if self.reads_length else outside(self.start(i), self.width, kv_len)

    @property
    def width(self) -> int:
        """The number of keys of a block and its halo."""
        return self.size + 2 * self.halo

    def start(self, i: Position) -> Position:
        """The first of them, for a query away from the edges; ``i`` is an int or a tensor."""
        return (i - self.shift) // self.size * self.size + self.shift - self.halo

    def __repr__(self) -> str:
        shift = f", shift={self.shift}" if self.shift else ""
        edge = f", edge={self.edge!r}" if self.edge != "clip" else ""
        return f"Blocks(size={self.size}, halo={self.halo}{shift}{edge})"


@dataclass(frozen=True, repr=False, eq=False)
class _Inside(Pattern):
    """``blocks`` at one length, which may be symbolic and then has no hash."""

    blocks: Blocks
    kv_len: int

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        width = self.blocks.width
        start = self.blocks.start(i).clamp(max=self.kv_len - width).clamp(min=0)
        return (j >= start) & (j < start + width)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return self.blocks.reach(first, last, kv_len)
