"""A model whose heads are of known kinds: each attends by position alone, as its scores are a bias that says where to look."""

from __future__ import annotations

import torch
from induction import Induction
from torch import Tensor, nn

from attnopt.statistics import SinkMass

WIDTH, HEAD = 32, 4
KINDS = ("previous", "uniform", "first", "local", "own")


def scores_of(kind: str, length: int, jitter: float = 0.0) -> Tensor:
    """[length, length]: what the softmax of a head of this kind reads."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    match kind:
        case "previous":
            scores = torch.where(j == (i - 1).clamp(min=0), 8.0, 0.0)
        case "uniform":
            scores = torch.zeros(length, length)
        case "first":
            scores = torch.where(j == 0, 6.0, 0.0).expand(length, -1)
        case "local":
            scores = -((i - j).abs().float()) / 2
        case _:
            scores = torch.where(j == i, 8.0, 0.0)
    return scores * (1 + jitter)


class Planted(nn.Module):
    """One attention with a head of each of ``kinds``."""

    def __init__(self, kinds: tuple[str, ...], longest: int = 64) -> None:
        super().__init__()
        self.kinds = kinds
        width = HEAD * len(kinds)
        self.q, self.k, self.v = (nn.Linear(WIDTH, width) for _ in range(3))
        self.o = nn.Linear(width, WIDTH)
        for p in (self.q.weight, self.k.weight):
            p.data *= 0.05
        noise = torch.linspace(-0.1, 0.1, len(kinds)).tolist()
        where = torch.stack([scores_of(kind, longest, x) for kind, x in zip(kinds, noise, strict=True)])
        self.where = nn.Buffer(where)

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        q, k, v = (f(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.mT / HEAD**0.5 + self.where[:, :L, :L]
        causal = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Attentions with different numbers of heads."""

    def __init__(self, *kinds: tuple[str, ...], longest: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Planted(own, longest) for own in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def planted() -> tuple[nn.Module, tuple[Tensor]]:
    """Every kind in every layer but the last, in other orders; the last has two heads."""
    torch.manual_seed(0)
    model = Stack(KINDS, KINDS[2:] + KINDS[:2], ("local", "previous"))
    return model.eval(), (torch.randn(4, 24, WIDTH),)


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 10, WIDTH), torch.randn(1, 24, WIDTH)]


def statistic() -> SinkMass:
    return SinkMass(keys=3)


def copying() -> tuple[nn.Module, tuple[Tensor]]:
    """A language model that continues repeated text, and two texts that it continues."""
    return Induction().eval(), (torch.tensor([[0, 3, 5, 1, 3, 5], [1, 6, 7, 2, 6, 7]]),)
