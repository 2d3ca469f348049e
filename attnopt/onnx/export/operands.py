"""The operands of an attention: nodes of a graph, or values of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Operands(Generic[T]):
    """As in ``AttentionSpec``; bias, mask and sinks are 4-D or None."""

    q: T
    k: T
    v: T
    bias: T | None = None
    mask: T | None = None
    sinks: T | None = None

    @property
    def given(self) -> dict[str, T]:
        """Those that are there, by role."""
        found = {f.name: getattr(self, f.name) for f in fields(Operands)}
        return {role: operand for role, operand in found.items() if operand is not None}

    @classmethod
    def of(cls, values: Sequence[T | None]) -> Operands[T]:
        """In the order of ``ROLES``; those at the end may be missing."""
        q, k, v, *rest = values
        assert q is not None
        assert k is not None
        assert v is not None
        return Operands(q, k, v, *rest)
