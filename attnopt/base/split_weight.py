"""Weights of which each process holds a part: plain tensors to what reads their form; what reads their values gathers them."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Part(ABC):
    """What this process holds of one weight.  All processes ask for the same weights in the same order."""

    @property
    @abstractmethod
    def form(self) -> Tensor:
        """A tensor with the shape, strides, dtype and device of the whole weight."""

    @abstractmethod
    def gather(self) -> Tensor:
        """The whole weight, put together from all processes."""

    @abstractmethod
    def of(self, x: Tensor) -> Part:
        """This process's part of another weight, which every process has whole."""


_kept: ContextVar[dict[Part, Tensor] | None] = ContextVar("_kept", default=None)


@contextmanager
def keeping_whole() -> Iterator[None]:
    """Inside, each weight is gathered once, and kept until the end."""
    outer = _kept.get()
    token = _kept.set({} if outer is None else outer)
    try:
        yield
    finally:
        _kept.reset(token)


class SplitWeight(Tensor):
    """A weight in the place of a plain one: an operator that reads it gets the whole, which is let go afterwards."""

    part: Part

    @staticmethod
    def __new__(cls, part: Part) -> SplitWeight:
        form = part.form
        made: SplitWeight = Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), dtype=form.dtype, device=form.device
        )
        made.part = part
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].part)
        args, kwargs = pytree.tree_map_only(SplitWeight, SplitWeight.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    def whole(self) -> Tensor:
        """All of it, from all processes."""
        kept = _kept.get()
        if kept is None:
            return self.part.gather()
        if self.part not in kept:
            kept[self.part] = self.part.gather()
        return kept[self.part]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SplitWeight({tuple(self.shape)}, {self.dtype})"  # values would have to be gathered by all processes


def split_like(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``x``, which all have whole, if ``like`` is split; otherwise ``x``."""
    if isinstance(x, SplitWeight) or not isinstance(like, SplitWeight):
        return x
    return SplitWeight(like.part.of(x))


def split_parameter(model: nn.Module) -> str | None:
    """The first parameter of which this process holds a part, as a DTensor."""
    sharded = sys.modules.get("torch.distributed.tensor")  # without it, there is none
    if sharded is None:
        return None
    return next((name for name, p in model.named_parameters() if isinstance(p, sharded.DTensor)), None)


def has_split(model: nn.Module) -> bool:
    """Whether weights of ``model`` are gathered where they are read."""
    return any(isinstance(x, SplitWeight) for x in (*model.parameters(), *model.buffers()))
