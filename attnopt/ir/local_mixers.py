"""Mixers of neighbouring tokens: depthwise convolutions and means over windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.base.options import switch, whole, whole_tuple
from attnopt.errors import PolicyError
from attnopt.ir.linear_mixer import LinearMixer
from attnopt.ir.site import Site


@dataclass(frozen=True)
class DepthwiseConv(LinearMixer):
    """A depthwise convolution over the tokens, or over their ``grid``: a weight for each offset and channel.

    ``kernel``: the tokens that it reads along each axis, an odd number, or for a causal one any number: then it reads the token
    itself and those before it.  ``grid``: (height, width) in row-major order.  ``prefix``: tokens before the others, such as a
    class token; these read each other and the mean of the others, and all others read these too.  ``causal``: None: if the
    attention is.  Raises PolicyError.
    """

    name: ClassVar[str] = "conv"
    looks_ahead: ClassVar[bool] = False
    kernel: int = 3
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    causal: bool | None = None

    def __post_init__(self) -> None:
        _read(self, "kernel")
        if self.causal is not None:
            switch(self.name, "causal", self.causal)
        if self.causal and (self.grid is not None or self.prefix):
            raise PolicyError("conv: a causal convolution has neither a grid nor a prefix")

    def at(self, site: Site) -> DepthwiseConv:
        causal = site.spec.is_causal if self.causal is None else self.causal
        return replace(self, causal=causal and self.grid is None and not self.prefix)

    def terms(self, v: Tensor, seen: Tensor | None) -> Sequence[Tensor]:
        return list(_shifted(v, self.grid, self.kernel, self._before))

    def local(self, v: Tensor, seen: Tensor | None, weights: Tensor) -> Tensor:
        H, _, D = weights.shape
        axes = 1 if self.grid is None else len(self.grid)
        filters = weights.permute(0, 2, 1).reshape(H * D, 1, *[self.kernel] * axes)
        x = F.pad(_channels_first(v, self.grid), [self._before, self.kernel - 1 - self._before] * axes)
        made = (F.conv1d if axes == 1 else F.conv2d)(x, filters, groups=H * D)
        return made.reshape(v.shape[0], H, D, v.shape[2]).mT

    @property
    def _before(self) -> int:
        """Of the tokens that it reads along an axis, those before the token itself."""
        return self.kernel - 1 if self.causal else self.kernel // 2


@dataclass(frozen=True)
class TokenPool(LinearMixer):
    """The token itself and the mean of a window around it, each with a weight for each channel (PoolFormer, arXiv:2111.11418).

    ``size``: the tokens of the window along each axis, an odd number; beyond the edges there are none.  ``grid``, ``prefix``: as
    those of ``conv``.  Raises PolicyError.
    """

    name: ClassVar[str] = "pool"
    size: int = 3
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        _read(self, "size")

    def terms(self, v: Tensor, seen: Tensor | None) -> Sequence[Tensor]:
        there = torch.ones_like(v[:, 0, :, :1]) if seen is None else seen.expand(len(v), -1)[..., None].to(v.dtype)
        counted = self._sums(there.unsqueeze(1)).clamp(min=1 / self.size ** (len(self.grid or (1,)) + 1))
        return [v, self._sums(v) / counted]

    def _sums(self, v: Tensor) -> Tensor:
        """[B, H, R, D]: the sums over windows, divided by their size."""
        B, H, R, D = v.shape
        x, half = _channels_first(v, self.grid), self.size // 2
        pooled = (F.avg_pool1d if self.grid is None else F.avg_pool2d)(x, self.size, 1, half, count_include_pad=True)
        return pooled.reshape(B, H, D, R).mT


def _read(mixer: DepthwiseConv | TokenPool, option: str) -> None:
    """Check the size of windows, ``option``, the grid and the prefix.  Raises PolicyError."""
    size, causal = getattr(mixer, option), getattr(mixer, "causal", False)
    whole(mixer.name, option, size, least=1)
    read_places(mixer)
    if size % 2 == 0 and not causal:
        only = "an odd number, or causal=True" if option == "kernel" else "an odd number"
        raise PolicyError(f"{mixer.name}: invalid value {option}={size!r}: expected {only}")


def read_places(mixer: LinearMixer) -> None:
    """Check grid and prefix.  Raises PolicyError."""
    whole(mixer.name, "prefix", mixer.prefix)
    if mixer.grid is None:
        return
    grid = whole_tuple(mixer.name, "grid", mixer.grid, 2, least=1)
    object.__setattr__(mixer, "grid", grid)


def _channels_first(v: Tensor, grid: Sequence[int] | None) -> Tensor:
    """[B, H * Dv, R], or with the axes of the grid."""
    B, H, R, D = v.shape
    return v.mT.reshape(B, H * D, *([R] if grid is None else grid))


def _shifted(v: Tensor, grid: Sequence[int] | None, kernel: int, before: int) -> Iterator[Tensor]:
    """``v`` as the tokens at each offset of the kernel see it, zeros beyond the edges."""
    sizes = [v.shape[2]] if grid is None else list(grid)
    x = F.pad(v.reshape(*v.shape[:2], *sizes, v.shape[3]), [0, 0, *[before, kernel - 1 - before] * len(sizes)])
    for offsets in product(range(kernel), repeat=len(sizes)):
        taken = x
        for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True), 2):
            taken = taken.narrow(axis, offset, size)
        yield taken.flatten(2, -2)
