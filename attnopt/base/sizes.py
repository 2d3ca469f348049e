"""Possibly symbolic sizes: their values for the example inputs, and facts about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from math import gcd
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import sympy

_DOUBLED = ContextVar("_DOUBLED", default=False)


def hint(size: int | torch.SymInt) -> int:
    """The size of an axis for the example inputs; -1 if it depends on their values."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    found = _doubled(size) if _DOUBLED.get() and not is_static(size) else size
    return int(found.node.hint) if found.node.hint is not None else -1


def _doubled(size: torch.SymInt) -> torch.SymInt:
    of: Any = size.node
    made: torch.SymInt = of.shape_env.create_symintnode(
        of.expr.xreplace({s: 2 * s for s in of.expr.free_symbols}), hint=None
    )
    return made


@contextlib.contextmanager
def at_double_sizes() -> Iterator[None]:
    """Here ``hint`` tells sizes for inputs that are twice as long along each axis that may vary."""
    token = _DOUBLED.set(True)
    try:
        yield
    finally:
        _DOUBLED.reset(token)


def symbols_of(sizes: Iterable[object]) -> set[sympy.Symbol]:
    """What varies in these sizes; numbers have none."""
    return {symbol for s in sizes if isinstance(s, torch.SymInt) for symbol in s.node.expr.free_symbols}


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
