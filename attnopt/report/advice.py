"""What ``attnopt.advise`` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnopt.base.display import shown


@dataclass(frozen=True)
class Reached:
    """``share`` of all pairs that a kernel computes, the speed-up that this allows, and that as a part of the bound."""

    kernel: str
    share: float
    speedup: float
    of_bound: float


@dataclass(frozen=True)
class Better:
    """A pattern whose windows are nowhere smaller, and which ``kernel`` computes faster, or for no more while it sees more."""

    kernel: str
    pattern: str
    density: float
    speedup: float


@dataclass(frozen=True)
class Advice:
    """``bound`` is how many times fewer pairs are visible than before; the speed-ups count pairs, not seconds."""

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
