"""Tensors that an attention reads beside its operands: known ones, and those that each call brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from attnopt.base.bit_table import indices
from attnopt.base.input import Input
from attnopt.ir.constant import Constant

BATCH, QUERIES, KEYS = "batch", "queries", "keys"
_HEADS = 1  # the axis of heads, if there is one

Size = int | torch.SymInt


@dataclass(frozen=True)
class CallTensor:
    """A tensor that each call brings as ``input``.

    ``axes``: of each axis its size, or what it counts: "batch", "queries", "keys", or another name for a length of its own, the
    same wherever the attention uses this name.  A batch, always the first axis, may also be 1 or missing.
    ``heads``: the places of axis 1 that are read; None: all of them, in their order.
    ``is_ids``: integers instead of floating-point numbers; ``is_mask``: bools.
    """

    input: Input
    axes: tuple[int | str, ...]
    heads: tuple[int, ...] | None = None
    is_ids: bool = False
    is_mask: bool = False

    @property
    def shape(self) -> tuple[int | str, ...]:
        """The axes of what is read."""
        return self.axes if self.heads is None else (self.axes[0], len(self.heads), *self.axes[2:])

    def read(self, given: Tensor) -> Tensor:
        """``given`` with every axis, and only with the heads that are read."""
        whole = given.unsqueeze(0) if given.dim() < len(self.axes) else given
        return whole if self.heads is None else whole.index_select(_HEADS, indices(self.heads, whole.device))

    def keeping(self, places: Sequence[int]) -> CallTensor:
        """The same with only these of its heads, in this order."""
        count = self.axes[_HEADS]
        assert isinstance(count, int)
        heads = range(count) if self.heads is None else self.heads
        kept = tuple(heads[i] for i in places)
        return replace(self, heads=None if kept == tuple(range(count)) else kept)

    def counted(self, dims: int) -> tuple[int | str, ...]:
        """``axes`` of an input with so many: without the batch where it is missing."""
        return self.axes[1:] if self.axes[0] == BATCH and dims == len(self.axes) - 1 else self.axes

    def lengths(self, given: Sequence[Size]) -> dict[str, Size]:
        """What the sizes of an input say about all that its axes count."""
        counted = self.counted(len(given))
        return {axis: size for axis, size in zip(counted, given, strict=False) if isinstance(axis, str)}

    @property
    def told(self) -> str:
        """ "batch x 4 x queries x 8" """
        return " x ".join(map(str, self.axes))

    def to_json(self) -> dict[str, Any]:
        """Plain data, which ``from_json`` reads back."""
        heads = None if self.heads is None else list(self.heads)
        return {
            "input": self.input.name,
            "axes": list(self.axes),
            "heads": heads,
            "is_ids": self.is_ids,
            "is_mask": self.is_mask,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``.  Raises PolicyError, ValueError, KeyError or TypeError."""
        axes = tuple(axis if isinstance(axis, str) else int(axis) for axis in data["axes"])
        heads = None if data["heads"] is None else tuple(map(int, data["heads"]))
        return cls(Input(data["input"]), axes, heads, bool(data["is_ids"]), bool(data["is_mask"]))

    def __str__(self) -> str:
        return self.input.name


Source = Constant | CallTensor


def source_from_json(data: Mapping[str, Any]) -> Source:
    """What ``to_json`` of either wrote."""
    return CallTensor.from_json(data) if "input" in data else Constant.from_json(data)


def of_heads(source: Source, places: Sequence[int], axis: int = 0) -> Source:
    """The tensor of these places among its heads, which a constant has on ``axis``."""
    if isinstance(source, CallTensor):
        return source.keeping(places)
    return Constant.of(source.tensor().index_select(axis, torch.tensor(list(places))))


def known(sources: Sequence[Source], device: torch.device | str = "cpu") -> list[Tensor]:
    """Constants as tensors.  Raises ValueError for what a call brings."""
    constants = [x for x in sources if isinstance(x, Constant)]
    if len(constants) < len(sources):
        raise ValueError(f"only a call brings {', '.join(str(x) for x in sources if x not in constants)}")
    return [c.tensor(device) for c in constants]
