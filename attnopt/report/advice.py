"""The result of ``attnopt.advise``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnopt.base.display import shown


@dataclass(frozen=True)
class Reached:
    """``share``: the fraction of pairs that a kernel computes, with the speed-up that this allows, absolute and
    relative to the bound.
    """

    kernel: str
    share: float
    speedup: float
    of_bound: float


@dataclass(frozen=True)
class Better:
    """A pattern with no smaller window that ``kernel`` computes faster, or at the same cost with more visible pairs."""

    kernel: str
    pattern: str
    density: float
    speedup: float


@dataclass(frozen=True)
class Advice:
    """``bound``: how many times fewer pairs are visible than before; speed-ups count pairs, not seconds."""

    pattern: str
    q_len: int
    kv_len: int
    density: float
    bound: float
    kernels: tuple[Reached, ...]
    better: tuple[Better, ...]

    def __str__(self) -> str:
        return shown(self, "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)
