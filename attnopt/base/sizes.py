"""Possibly symbolic sizes: their values for the example inputs, and facts about them."""

from __future__ import annotations

from math import gcd

import torch


def hint(size: int | torch.SymInt) -> int:
    """The size of an axis for the example inputs; -1 if it depends on their values."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.hint is not None else -1
    return int(size)


def is_static(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.expr.is_number


def step(size: int | torch.SymInt) -> int:
    """For all inputs, the size is ``hint(size)`` plus a multiple of this; 0 if it is static."""
    if isinstance(size, int) or is_static(size):
        return 0
    terms = size.node.expr.expand().as_coefficients_dict()
    factors = [factor for term, factor in terms.items() if not term.is_number]
    return gcd(*map(int, factors)) if all(factor.is_integer for factor in factors) else 1


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """The two sizes are equal for all input sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = a if isinstance(a, int) else a.node.expr
    right = b if isinstance(b, int) else b.node.expr
    return bool(left == right)
