"""A model of two attention layers that is trained, in seconds, to continue repeated text: which heads do it is not given."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

WORDS, PLACES, WIDTH, HEADS = 16, 32, 48, 4
STEPS, BATCH, LENGTH = 600, 64, 24


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.head(x)
        return logits


def repeated(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random words that repeat after a number of them that varies, [N, L], and which can be foretold from those before."""
    ids = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    period = torch.randint(4, LENGTH // 2, (count, 1), generator=generator)
    place = torch.arange(LENGTH).expand(count, -1)
    return ids.gather(1, place % period), place > period


@cache
def trained() -> Trained:
    """Foretells nine in ten of the words that repeat."""
    torch.manual_seed(0)
    model, generator = Trained(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, STEPS)
    for _ in range(STEPS):
        ids, known = repeated(BATCH, generator)
        loss = nn.functional.cross_entropy(model(ids[:, :-1])[known[:, 1:]], ids[:, 1:][known[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def foretold(model: nn.Module, seed: int = 1) -> float:
    """The share of the words that repeat which the model foretells."""
    ids, known = repeated(256, torch.Generator().manual_seed(seed))
    found: Tensor = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
    return float(found[known[:, 1:]].double().mean())
