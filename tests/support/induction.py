"""A model of two attentions that continues repeated text, its circuit set by hand."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
from torch import Tensor, nn

WORDS, PLACES, SIZE, HEADS = 8, 6, 10, 3  # tokens, positions, features of a head, heads of a layer
SURE = 8.0  # how sharply the planted heads attend
PREVIOUS, INDUCTION = ("layers.0", 1), ("layers.1", 2)  # the circuit
CLEAN = torch.tensor([[0, 3, 5, 1, 2, 3], [4, 6, 7, 2, 1, 6]])  # "3 5 ... 3": 5 follows
CORRUPTED = torch.tensor([[0, 7, 5, 1, 2, 3], [4, 0, 7, 2, 1, 6]])  # 3 was never seen before
ANSWERS = torch.tensor([5, 7])


class Induction(nn.Module):
    """Residual features: the token, its position, the token before it, and what to say next."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width = HEADS * SIZE
        token, place = slice(0, WORDS), slice(WORDS, WORDS + PLACES)
        before, said = slice(14, 14 + WORDS), slice(22, 22 + WORDS)
        self.embed = nn.Embedding(WORDS, width)
        self.embed.weight.data.zero_()
        self.embed.weight.data[:, token] = torch.eye(WORDS)
        self.places = nn.Parameter(torch.zeros(PLACES, width))
        self.places.data[:, place] = torch.eye(PLACES)
        self.layers = nn.ModuleList(tiny_models.Attention(width, HEADS) for _ in range(2))
        for layer in self.layers:
            for p in layer.parameters():
                p.data = 1e-3 * torch.randn(p.shape, generator=generator)
        shifted = torch.eye(PLACES).roll(1, 0) * (torch.arange(PLACES) > 0)[:, None]
        _plant(self.layers[0], PREVIOUS[1], (place, shifted.T), (place, torch.eye(PLACES)), token, before)
        _plant(self.layers[1], INDUCTION[1], (token, torch.eye(WORDS)), (before, torch.eye(WORDS)), token, said)
        self.unembed = nn.Linear(width, WORDS, bias=False)
        self.unembed.weight.data.zero_()
        self.unembed.weight.data[:, said] = torch.eye(WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.unembed(x)
        return logits


def _plant(
    layer: Any, head: int, q: tuple[slice, Tensor], k: tuple[slice, Tensor], reads: slice, writes: slice
) -> None:
    rows = slice(head * SIZE, (head + 1) * SIZE)
    for part, (where, how) in ((layer.q, q), (layer.k, k), (layer.v, (reads, torch.eye(WORDS)))):
        part.weight.data[rows] = 0.0
        part.bias.data[rows] = 0.0
        scale = 1.0 if part is layer.v else SURE
        part.weight.data[head * SIZE : head * SIZE + len(how), where] = scale * how
    layer.o.weight.data[:, rows] = 0.0
    layer.o.weight.data[writes, head * SIZE : head * SIZE + WORDS] = torch.eye(WORDS)


def said_right(logits: Tensor) -> Tensor:
    """The mean logit of the right answer over that of the other sequence's."""
    last = logits[:, -1]
    right, wrong = last.gather(1, ANSWERS[:, None]), last.gather(1, ANSWERS.flip(0)[:, None])
    return (right - wrong).mean()
