"""Attentions without a softmax, each spelled in its own way, with what all of them mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, D, V = 3, 4, 5  # heads, features of queries and keys, and of values: no two sizes are equal
WIDTH = 13
RATES = (0.5, 0.0625, 0.01)


class Linear(nn.Module):
    """[B, L, WIDTH] -> [B, L, WIDTH].  Subclasses compute ``mixed``."""

    causal = False
    rates: tuple[float, ...] = (0.0,) * H
    divides = False
    added = 0.0
    least: float | None = None
    absolute = False
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, H * D), nn.Linear(WIDTH, H * D)
        self.v, self.out = nn.Linear(WIDTH, H * V), nn.Linear(H * V, WIDTH)
        self.register_buffer("slopes", torch.tensor(self.rates))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, L, D], [B, H, L, D], [B, H, L, V]"""
        q, k, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.feature(q), self.feature(k), v

    def feature(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1

    def merged(self, o: Tensor) -> Tensor:
        """Of [B, H, L, V]."""
        made: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(self.mixed(*self.heads(x)))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def decay(self, length: int) -> Tensor:
        """[H, L, L]"""
        places = torch.arange(length)
        steps = (places[:, None] - places).clamp(min=0)
        return torch.exp(-self.slopes[:, None, None] * steps).tril()


def meant(model: Linear, x: Tensor, gains: Sequence[float] = (1.0,) * H, visible: Tensor | None = None) -> Tensor:
    """The definition, pair by pair; ``visible``: bool [L, L] or [H, L, L], for what a pattern leaves."""
    q, k, v = model.heads(x)
    i = torch.arange(x.shape[1])
    steps = i[:, None] - i
    seen = (steps >= 0) if model.causal else torch.ones_like(steps, dtype=torch.bool)
    seen = seen if visible is None else seen & visible
    fading = (-model.slopes.double()[:, None, None] * steps).exp().to(q.dtype)
    weights = torch.where(seen, model.scale * torch.einsum("bhld,bhsd->bhls", q, k) * fading, 0.0)
    if model.divides:
        total = weights.sum(-1, keepdim=True)
        total = total.abs() if model.absolute else total
        total = total if model.least is None else total.clamp(min=model.least)
        weights = (weights / (total + model.added)).nan_to_num(0.0)
    return model.merged(weights @ v * torch.tensor(gains, dtype=v.dtype)[:, None, None])


# ---------------------------------------------------------------- weights that fade
class Retention(Linear):
    """As RetNet's parallel form makes its mask, with the scale on the keys."""

    causal, rates, scale = True, RATES, D**-0.5

    def feature(self, x: Tensor) -> Tensor:
        return x

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        index = torch.arange(n, dtype=q.dtype)
        mask = torch.tril(torch.ones(n, n))
        mask = torch.masked_fill(index[:, None] - index[None, :], ~mask.bool(), float("inf"))
        mask = torch.nan_to_num(torch.exp(mask * -self.slopes[:, None, None]))
        return (q @ (k * D**-0.5).transpose(-1, -2) * mask) @ v


class Lightning(Linear):
    """Features of SiLU, einsum, heads behind tokens, and a factor that is the first operand (TNL)."""

    causal, rates = True, RATES

    def feature(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, -1)) for f in (self.q, self.k, self.v))
        weights = torch.einsum("blhd,bshd->bhls", self.feature(q), self.feature(k))
        weights = self.decay(x.shape[1]) * weights
        made: Tensor = self.out(torch.einsum("bhls,bshe->blhe", weights, v).flatten(2))
        return made


class Power(Linear):
    """A base to the power of distances, zeros by ``where``, and products of batch x heads."""

    causal, rates = True, RATES

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, n, _ = q.shape
        i = torch.arange(n)
        base = torch.exp(-self.slopes)[:, None, None]
        weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, H, n, n)
        weights = torch.where(i[:, None] >= i, weights * base ** (i[:, None] - i), 0.0)
        return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (B, H))


class Stored(Linear):
    """A buffer of decays, sliced."""

    causal, rates = True, RATES

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", self.decay(64))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT).mul(self.table[:, :n, :n]) @ v


class Normalised(Linear):
    """Retention divided by the absolute value of its sum, to which no gradient flows, or by 1 if that is less (RetNet)."""

    causal, rates, scale = True, RATES, D**-0.5
    divides, least, absolute = True, 1.0, True

    def feature(self, x: Tensor) -> Tensor:
        return x

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = q @ (k * self.scale).mT * self.decay(q.shape[2])
        return weights / weights.detach().sum(-1, keepdim=True).abs().clamp(min=1) @ v


FADING = (Retention, Lightning, Power, Stored, Normalised)


# ---------------------------------------------------------------- weights that do not
class Quadratic(Linear):
    """All pairs, divided by the sum of each row after the product with the values."""

    divides, added = True, 1e-6

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = q @ k.mT
        return weights @ v / (weights.sum(-1, keepdim=True) + self.added)


class StateFirst(Linear):
    """Keys meet values first, heads behind tokens, the inverse of the sums multiplied (arXiv:2006.16236)."""

    divides, added = True, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, -1)) for f in (self.q, self.k, self.v))
        q, k = self.feature(q), self.feature(k)
        state = torch.einsum("nshd,nshm->nhmd", k, v)
        z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + self.added)
        made: Tensor = self.out(self.divided(q, state, z).flatten(2))
        return made

    def divided(self, q: Tensor, state: Tensor, z: Tensor) -> Tensor:
        return torch.einsum("nlhd,nhmd->nlhm", q, state) * z[..., None]


class ThreeFactors(StateFirst):
    """The same with queries, state and inverse sums in one einsum, as in fast-transformers."""

    def divided(self, q: Tensor, state: Tensor, z: Tensor) -> Tensor:
        return torch.einsum("nlhd,nhmd,nlh->nlhm", q, state, z)


class StateByMatmul(Linear):
    """The same with products of matrices, and the sums as another product."""

    divides = True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)


class CausalSums(Linear):
    """A triangle, and rows divided before the product with the values."""

    causal, divides, added = True, True, 1e-3

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).tril()
        return weights / (weights.sum(-1, keepdim=True) + self.added) @ v


class CausalFilled(Linear):
    """Zeros are filled in where keys come later; nothing divides."""

    causal = True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        return torch.einsum("bhls,bhse->bhle", torch.einsum("bhld,bhsd->bhls", q, k).masked_fill(later, 0.0), v)


class CausalState(Linear):
    """Running sums of keys times values, and of keys."""

    causal, divides = True, True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = torch.einsum("bhld,bhlm->bhldm", k, v).cumsum(2)
        return torch.einsum("bhld,bhldm->bhlm", q, state) / (q * k.cumsum(2)).sum(-1, keepdim=True)


class CausalOuter(Linear):
    """The same with products one by one, features in the last axis, and no sums that divide."""

    causal = True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = torch.cumsum(v.unsqueeze(-1) * k.unsqueeze(-2), dim=-3)
        return (state @ q.unsqueeze(-1)).squeeze(-1)


STEADY = (
    Quadratic,
    StateFirst,
    ThreeFactors,
    StateByMatmul,
    CausalSums,
    CausalFilled,
    CausalState,
    CausalOuter,
)
SPELLINGS = (*FADING, *STEADY)
