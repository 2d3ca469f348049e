"""An order of rows that no rounding can change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnopt


@attnopt.register
@dataclass(frozen=True)
class Shuffled(attnopt.RowScores):
    """Tokens in an order of their own, some of them alike, whatever they say."""

    seed: int

    def score(self, q_BHLD: Tensor, k_BHSD: Tensor, **_: Any) -> Tensor:
        place = torch.arange(q_BHLD.shape[2], device=q_BHLD.device)
        return self.of(place).expand(q_BHLD.shape[0], -1)

    def of(self, place: Tensor) -> Tensor:
        return ((place * 7 + self.seed) % 5).float()
