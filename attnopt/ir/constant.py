"""A tensor as a value: comparable, hashable, usable in a frozen spec, serializable to JSON."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Self

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {str(d).removeprefix("torch."): d for d in (*_FLOATS, torch.bool)}


@dataclass(frozen=True)
class Constant:
    """Numbers of one floating-point ``dtype`` (its torch name), bit for bit, or bools.  Raises ValueError if they do not fit."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.dtype!r} is not one of {', '.join(_DTYPES)}")
        if not self.shape or min(self.shape) < 1 or len(self.data) != prod(self.shape) * _DTYPES[self.dtype].itemsize:
            raise ValueError(f"{len(self.data)} bytes do not fit {self.dtype} values of shape {list(self.shape)}")

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        held = tensor.detach().cpu().contiguous()
        data = held.reshape(-1).view(torch.uint8).numpy().tobytes()
        return cls(str(held.dtype).removeprefix("torch."), tuple(held.shape), data)

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """A new tensor each time."""
        made = torch.frombuffer(bytearray(self.data), dtype=_DTYPES[self.dtype])
        return made.reshape(self.shape).to(device)

    def to_json(self) -> dict[str, Any]:
        """Plain data, which ``from_json`` reads back."""
        return {"dtype": self.dtype, "shape": list(self.shape), "data": b64encode(self.data).decode("ascii")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``.  Raises ValueError, KeyError or TypeError."""
        return cls(str(data["dtype"]), tuple(map(int, data["shape"])), b64decode(data["data"], validate=True))


@dataclass(frozen=True)
class Weight(Constant):
    """Numbers that training may change: a parameter of the graph's module, where other constants are buffers."""
