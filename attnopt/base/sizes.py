"""Possibly symbolic sizes: their values for the example inputs, and facts about them."""

from __future__ import annotations

import torch


def hint(size: int | torch.SymInt) -> int:
    """The size of an axis for the example inputs; -1 if it depends on their values."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.hint is not None else -1
    return int(size)


def is_static(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.expr.is_number


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """The two sizes are equal for all input sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = a if isinstance(a, int) else a.node.expr
    right = b if isinstance(b, int) else b.node.expr
    return bool(left == right)
