"""What objects that hold tensors are made of: a template, which with its leaves gives them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Leaf:
    """A tensor or number, by its index among the leaves."""

    place: int


@dataclass(frozen=True)
class Passed:
    """A tensor or number passed by the caller, by its index among the leaves of the input."""

    place: int


@dataclass(frozen=True)
class Made:
    """An object, by its index among the nodes of the template."""

    place: int


@dataclass(frozen=True)
class Given:
    """An object passed by the caller, by its index among the nodes of the input."""

    place: int


@dataclass(frozen=True)
class Fixed:
    """A value that is the same at every call."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and _equal(other.value, self.value)

    def __hash__(self) -> int:
        return hash(type(self.value))


Part = Leaf | Passed | Made | Given | Fixed


@dataclass(frozen=True)
class Kind:
    """A class by name; ``cls`` is None if it was read from a file and must not be instantiated."""

    name: str
    cls: type | None = field(default=None, compare=False)

    @classmethod
    def of(cls, found: type) -> Kind:
        return cls(f"{found.__module__}:{found.__qualname__}", found)


@dataclass(frozen=True)
class Node:
    """An object: its attributes by name, and its items as a sequence or a mapping."""

    kind: Kind
    attributes: tuple[tuple[str, Part], ...]
    items: tuple[tuple[Any, Part], ...]

    def parts(self) -> Iterator[tuple[object, Part]]:
        yield from self.attributes
        yield from self.items


def _equal(x: object, wanted: object) -> bool:
    if x is wanted:
        return True
    if type(x) is not type(wanted) or isinstance(x, Tensor):
        return False
    try:
        return bool(x == wanted) or (isinstance(x, float) and x != x and wanted != wanted)
    except Exception:
        return False
