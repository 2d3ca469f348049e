"""A small model that reads token ids, and texts for it."""

from __future__ import annotations

import torch
from stacks import stack
from torch import Tensor, nn

WORDS, BEGIN = 300, 7


class Reader(nn.Module):
    """Tokens and their positions through two attentions; the first words have few features."""

    def __init__(self, words: int = WORDS, causal: bool = False) -> None:
        super().__init__()
        self.layers = stack(causal=causal).layers
        torch.manual_seed(2)
        self.words, self.places = nn.Embedding(words, 16), nn.Embedding(400, 16)
        self.words.weight.data[:50, 6:] = 0.0
        self.places.weight.data *= 0.1

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        x: Tensor = self.words(ids) + self.places(places)
        for layer in self.layers:
            x = x + layer(x)
        return x


def texts(low: int = 10, high: int = 40, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """All begin alike; their words are from ``low`` on and below ``high``."""
    generator = torch.Generator().manual_seed(low)
    found = []
    for _ in range(count):
        ids = torch.randint(low, high, (8, 12), generator=generator)
        ids[:, 0] = BEGIN
        found.append((ids, torch.arange(12).expand(8, 12).contiguous()))
    return found
