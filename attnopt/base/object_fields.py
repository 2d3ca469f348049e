"""What an object holds: its attributes and items, of any class that can be looked into."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections import OrderedDict, deque

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
VALUES = (
    Tensor, bool, int, float, complex, str, bytes, type(None), type(...), type, enum.Enum, range, slice, frozenset, set,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, *NUMBERS, nn.Module, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip
SEQUENCES, MAPPINGS = (list, deque), (dict, OrderedDict)
_OWN_FIELDS = (object, *SEQUENCES, tuple, torch.Size, *MAPPINGS)


def is_object(x: object) -> bool:
    """Neither a value nor a tree of values that torch.export flattens: it may hold tensors."""
    if isinstance(x, VALUES):
        return False
    if pytree.tree_is_leaf(x):
        return type(x) not in pytree.CONSTANT_NODES and fields_of(x) is not None
    return not isinstance(x, (tuple, *SEQUENCES, *MAPPINGS)) and not dataclasses.is_dataclass(x)


def base_of(cls: type) -> type | None:
    """The built-in class that creates the instances of ``cls``; None if it has hidden state."""
    for c in cls.__mro__:
        if c in _OWN_FIELDS:
            return c
        if isinstance(vars(c).get("__new__"), types.BuiltinFunctionType):
            return None
    return None


def fields_of(x: object) -> tuple[dict[str, object], list[tuple[object, object]]] | None:
    """(attributes, items) of an object; None for one that cannot be looked into."""
    if base_of(type(x)) is None:
        return None
    attributes = dict(vars(x)) if hasattr(x, "__dict__") else {}
    slots = [s for c in type(x).__mro__ for s in _slots(c)]
    attributes.update({s: getattr(x, s) for s in slots if hasattr(x, s)})
    if isinstance(x, deque):
        return {**attributes, "maxlen": x.maxlen}, list(enumerate(x))
    if isinstance(x, (list, tuple)):
        return attributes, list(enumerate(x))
    if isinstance(x, dict):
        return attributes, list(x.items())
    return (attributes, []) if slots or hasattr(x, "__dict__") else None


def _slots(cls: type) -> tuple[str, ...]:
    found = vars(cls).get("__slots__", ()) if cls not in _OWN_FIELDS else ()
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(
        f"_{cls.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n
        for n in names
        if n not in ("__dict__", "__weakref__")
    )
