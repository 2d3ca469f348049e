"""Attentions whose softmax is over queries, each spelled in its own way, with what all of them mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

H, D, V = 3, 4, 5  # heads, features of senders and receivers, and of values: no two sizes are equal
WIDTH = 13


class Sending(nn.Module):
    """[B, N, WIDTH] -> [B, N, WIDTH].  ``a`` makes the tokens that send, ``b`` those that receive.
    Subclasses compute ``mixed``."""

    scale = D**-0.5

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, H * D), nn.Linear(WIDTH, H * D)
        self.v, self.out = nn.Linear(WIDTH, H * V), nn.Linear(H * V, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, N, D], [B, H, N, D], [B, H, N, V]"""
        a, b, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.a, self.b, self.v))
        return a, b, v

    def merged(self, o: Tensor) -> Tensor:
        """Of [B, H, N, V]."""
        made: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(self.mixed(*self.heads(x)))

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def bias(self, length: int) -> Tensor:
        """[H, receivers, senders]"""
        return torch.zeros(H, length, length)


def meant(model: Sending, x: Tensor, gains: Sequence[float] = (1.0,) * H, visible: Tensor | None = None) -> Tensor:
    """The definition, pair by pair; ``visible``: bool [receivers, senders], for what a pattern leaves."""
    a, b, v = model.heads(x)
    scores = model.scale * torch.einsum("bhrd,bhsd->bhrs", b, a) + model.bias(x.shape[1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(2).nan_to_num(0.0)
    return model.merged(weights @ v * torch.tensor(gains, dtype=v.dtype)[:, None, None])


class Reversed(Sending):
    """The transposed weights of an attention (DependencyViT)."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return (a @ b.mT * self.scale).softmax(-1).mT @ v


class OfColumns(Sending):
    """A softmax over the axis before the last."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return (b * self.scale @ a.mT).softmax(-2) @ v


class Einsums(Sending):
    """Heads behind tokens, in products that name their axes."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, v = (f(x).unflatten(-1, (H, -1)) for f in (self.a, self.b, self.v))
        weights = torch.einsum("bshd,brhd->bhsr", a, b).mul(self.scale).softmax(-1)
        made: Tensor = self.out(torch.einsum("bhsr,bshe->brhe", weights, v).flatten(2))
        return made


class ValuesFirst(Sending):
    """Values on the left, batch x heads as one axis, and exponentials that are divided by their sum."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        B = len(a)
        a, b, v = (x.flatten(0, 1) for x in (a, b, v))
        terms = torch.exp(torch.bmm(a, b.mT) * self.scale)
        weights = terms / terms.sum(2, keepdim=True)
        return torch.bmm(v.mT, weights).mT.unflatten(0, (B, H))


class Biased(Sending):
    """Beside a table by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, 1023))

    def bias(self, length: int) -> Tensor:
        places = torch.arange(length)
        return self.table[:, (places - places[:, None]).clamp(-511, 511) + 511]

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return (a @ b.mT * self.scale + self.bias(a.shape[2]).mT).softmax(-1).mT @ v


SPELLINGS = (Reversed, OfColumns, Einsums, ValuesFirst, Biased)


# ---------------------------------------------------------------- what looks alike
class Renormalised(Sending):
    """Slot attention: what a slot receives is divided by its sum."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        weights = (a @ b.mT * self.scale).softmax(-1)
        return (weights / weights.sum(-2, keepdim=True)).mT @ v


class OfHeads(Sending):
    """A softmax over heads."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return (a @ b.mT * self.scale).softmax(1).mT @ v


class OfPairs(Sending):
    """Values that each receiver has of its own."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        weights = (a @ b.mT * self.scale).softmax(-1)
        return torch.einsum("bhsr,bhsre->bhre", weights, v[:, :, :, None] * v[:, :, None])


class HiddenByNumber(Sending):
    """A large number hides: where it hides a sender from all, it sends to all alike."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool).triu(1)
        return (a @ b.mT * self.scale).masked_fill(later, -1e9).softmax(-1).mT @ v


class WithSink(Sending):
    """What is sent to nobody."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        scores = a @ b.mT * self.scale
        sunk = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
        return sunk.mT @ v


class Gated(Sending):
    """Weights that each pair's features gate."""

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return ((a @ b.mT * self.scale).softmax(-1) * torch.sigmoid(v @ v.mT)).mT @ v


DECOYS = {
    Renormalised: "weights-changed",
    OfHeads: "softmax-axis",
    OfPairs: "value-axis",
    HiddenByNumber: "softmax-over-queries",
    WithSink: "softmax-over-queries",
    Gated: "weights-changed",
}
