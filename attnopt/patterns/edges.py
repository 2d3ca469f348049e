"""Windows at the edges of a sequence."""

from __future__ import annotations

from torch import Tensor


def outside(start: Tensor, width: int, length: int) -> Tensor:
    """How many of ``width`` places from ``start`` on are not among the first ``length``."""
    before = (-start).clamp(min=0, max=width)
    behind = (start + width).sub(length).clamp(min=0, max=width)
    return (before + behind).clamp(max=width)
