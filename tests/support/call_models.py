"""Attentions written by hand, for laws about what each call brings beside the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS, SIZE = 4, 8


class Attention(nn.Module):
    """Between the tokens of ``x``, or from these to those of ``y``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * SIZE, HEADS * SIZE) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        z = x if y is None else y
        q, k, v = (f(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f, t in ((self.q, x), (self.k, z), (self.v, z)))
        weights = (q @ k.mT / SIZE**0.5).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))
