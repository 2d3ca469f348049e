"""Trees of values, and the paths to their leaves."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils import _pytree as pytree

Path = tuple[Any, ...]  # of attributes, keys and indices


def mapped(x: object, stop: Callable[[object, Path], bool], f: Callable[[Any, Path], object], path: Path = ()) -> Any:
    """A tree of values with ``f`` applied to each leaf; ``stop`` marks leaves that torch would enter."""
    if stop(x, path) or pytree.tree_is_leaf(x):
        return f(x, path)
    children, spec = pytree.tree_flatten(x, is_leaf=lambda y: y is not x)
    keys = _keys(x, len(children))
    made = [mapped(c, stop, f, (*path, key)) for key, c in zip(keys, children, strict=True)]
    return pytree.tree_unflatten(made, spec)


def in_lists(x: object, f: Callable[[Any], object]) -> Any:
    """``f`` of each leaf in torch.export's notation of dynamic shapes, in which classes of a library's own are lists."""
    if pytree.tree_is_leaf(x):
        return f(x)
    children, spec = pytree.tree_flatten(x, is_leaf=lambda y: y is not x)
    made = [in_lists(c, f) for c in children]
    known = type(x) in (list, tuple, deque, dict, OrderedDict, defaultdict) or hasattr(x, "_fields")
    return pytree.tree_unflatten(made, spec) if known else made


def _keys(x: object, count: int) -> Sequence[object]:
    if isinstance(x, Mapping) and len(x) == count:
        return list(x)
    if dataclasses.is_dataclass(x):
        names = [f.name for f in dataclasses.fields(x)]
        if len(names) == count:
            return names
    return list(getattr(x, "_fields", range(count)))


def text(path: Path) -> str:
    """A path in Python notation."""
    parts = [f"[{p!r}]" if not isinstance(p, str) or not p.isidentifier() else f".{p}" for p in path]
    return "".join(parts).removeprefix(".")
