"""What flows along an ONNX graph: tensors, and small arrays that are known while it is traced.

Sizes, axes and scalar constants stay in numpy, so a reshape gets its sizes and the matcher the scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Known = NDArray[Any]  # of numbers, or of objects if some are symbolic sizes
Value = Tensor | Known
LARGEST = 64  # integers of a constant that may be sizes or axes


def is_known(value: object) -> bool:
    return isinstance(value, np.ndarray)


def stays_known(array: Known) -> bool:
    """A constant that is rather a setting than data."""
    return array.size == 1 or (array.dtype.kind in "iub" and array.size <= LARGEST and array.ndim <= 1)


def tensor(value: Value, like: Tensor | None = None) -> Tensor:
    """The value as a tensor; symbolic sizes become one too."""
    if isinstance(value, Tensor):
        return value
    if value.dtype == object:
        flat = [torch.full((), n, dtype=torch.int64) for n in value.reshape(-1)]
        return torch.stack(flat).reshape(value.shape) if flat else torch.empty(value.shape, dtype=torch.int64)
    made = torch.from_numpy(np.array(value))
    return made if like is None else made.to(like.device)


def operand(value: Value, beside: Value) -> Tensor | float | int | bool:
    """The value for an elementwise operator with a tensor: one number stays a number."""
    if isinstance(value, Tensor):
        return value
    if value.size == 1 and value.dtype != object and isinstance(beside, Tensor) and value.ndim <= beside.dim():
        number: float | int | bool = value.item()
        fits = isinstance(number, int) or beside.is_floating_point()
        if fits and value.dtype.kind != "b":
            return number
    return tensor(value, beside if isinstance(beside, Tensor) else None)


def numbers(value: Value) -> list[Any]:
    """Sizes or axes as a list; symbolic ones among them."""
    if not isinstance(value, np.ndarray):
        raise TypeError("sizes computed from input values")
    return [n if isinstance(n, torch.SymInt) else int(n) for n in value.reshape(-1)]


def known(sizes: Iterable[int | torch.SymInt]) -> Known:
    """Sizes as a value; plain integers if none is symbolic."""
    listed = list(sizes)
    if all(isinstance(n, int) for n in listed):
        return np.asarray(listed, np.int64)
    made = np.empty(len(listed), object)
    made[:] = listed
    return made
