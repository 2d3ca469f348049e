"""Models with attentions that are missed or refused, for the command line: ``odd_models:...``."""

from __future__ import annotations

from typing import Any

import decoys
import torch
from tiny_models import Stack
from torch import Tensor, nn


class Mixed(nn.Module):
    """An attention, one whose scores are changed, and a gate that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList([Stack().layers[0], Stack().layers[0]])
        self.cubed, self.gate = decoys.CubedScores(), decoys.SoftmaxGate()
        self.inside, self.outside = nn.Linear(decoys.E, 16), nn.Linear(16, decoys.E)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        for layer in self.stack:
            y = y + layer(y)
        return self.gate(self.cubed(self.outside(y)))


def mixed() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return Mixed(), (torch.randn(2, decoys.L, decoys.E),)


def other_inputs() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Linear(3, 3), (torch.zeros(1, 3),)
