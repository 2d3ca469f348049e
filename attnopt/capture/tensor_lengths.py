"""``len(x)`` of a tensor under torch.export: Python converts the result of ``__len__`` to an int, which fixes the axis."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def lengths_vary(model: nn.Module) -> Iterator[None]:
    """Inside, ``len`` in the Python modules of the model's classes returns a tensor's first size symbolically."""
    names = {c.__module__ for m in model.modules() for c in type(m).__mro__ if not _is_torch(c.__module__)}
    spaces = [vars(sys.modules[n]) for n in sorted(names) if n in sys.modules and "len" not in vars(sys.modules[n])]
    for space in spaces:
        space["len"] = _len
    try:
        yield
    finally:
        for space in spaces:
            del space["len"]


def _len(x: Sized, /) -> int:
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else len(x)


def _is_torch(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "builtins", "attnopt")
