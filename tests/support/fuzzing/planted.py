"""A convolution whose weights are drawn, not fitted, alike in all channels: the same as a map that no input changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import attnopt
from attnopt.ir.local_mixers import DepthwiseConv
from attnopt.ir.mixer import Pairs


@attnopt.register
@dataclass(frozen=True)
class Planted(DepthwiseConv):
    """``seed`` draws the weights."""

    name: ClassVar[str] = "test.planted"
    seed: int = 0

    def fit(self, pairs: Sequence[Pairs]) -> Sequence[Tensor]:
        _, H, _, D = pairs[0].o.shape
        return self.drawn[:, None].expand(H, -1, D), torch.zeros(H, 1, 1, D)

    @property
    def drawn(self) -> Tensor:
        return torch.randn(self.kernel, generator=torch.Generator().manual_seed(self.seed))

    def map(self, length: int, causal: bool) -> Tensor:
        """[L, S]"""
        step = torch.arange(length) - torch.arange(length)[:, None]
        place = step + (self.kernel - 1 if causal else self.kernel // 2)
        return self.drawn[place.clamp(0, self.kernel - 1)] * ((place >= 0) & (place < self.kernel))
