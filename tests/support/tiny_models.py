"""Small models that the command line and the plugin's test name as ``tiny_models:...``."""

from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, L, E = x.shape
        q, k, v = (f(x).view(B, L, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (E // self.heads) ** 0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, E))


class Stack(nn.Module):
    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(causal=causal) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def causal() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return Stack(), (torch.randn(2, 12, 16),)


def full() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return Stack(causal=False), (), {"x": torch.randn(2, 12, 16)}


def batches() -> list[Tensor]:
    """Data for ``causal``."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 12, 16, generator=generator) for _ in range(4)]


def without_inputs() -> nn.Module:
    return Stack()


def without_attention() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Linear(4, 4), (torch.zeros(2, 4),)


def failing() -> nn.Module:
    raise RuntimeError("no such checkpoint")


def wrong() -> list[int]:
    return [1]


constant = 3
