"""Attention without a softmax in a spelling that a number draws: a line of the grammar of random cases."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from decoys import Decoy, H
from torch import Tensor

RATES = (0.4, 0.05, 0.0)


class AnyLinear(Decoy):
    """Causal or not, fading or not, divided early, late or not, of pairs or of a state; all of them are read."""

    def __init__(self, number: int) -> None:
        super().__init__()
        r = random.Random(number)
        self.causal = r.random() < 0.6
        self.fades = self.causal and r.random() < 0.6
        self.divided = r.choice(("", "early", "late")) if self.causal else r.choice(("early", "late"))
        self.of_state = not self.fades and self.divided != "early" and r.random() < 0.5
        self.feature = r.choice(("elu", "exp")) if self.divided else r.choice(("", "silu", "elu"))
        self.product = r.choice(("matmul", "einsum", "bmm", "heads-last"))
        self.zeros = r.choice(("tril", "where", "fill", "times"))
        self.scale = r.choice(("", "q", "after"))
        self.added = r.choice((0.0, 1e-6)) if self.divided else 0.0
        self.commuted, self.inverse = r.random() < 0.5, r.random() < 0.5
        self.register_buffer("rates", torch.tensor(RATES if self.fades else (0.0,) * H), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = self._features(q), self._features(k)
        q = q * 0.5 if self.scale == "q" else q
        return self.merged(self._of_state(q, k, v) if self.of_state else self._of_pairs(q, k, v))

    def _features(self, x: Tensor) -> Tensor:
        if self.feature == "elu":
            return F.elu(x) + 1
        if self.feature == "exp":
            return torch.exp(x / 4)
        return F.silu(x) if self.feature == "silu" else x

    def _of_pairs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self._pairs(q, k)
        weights = weights * 0.5 if self.scale == "after" else weights
        weights = self._shown(weights)
        if self.divided == "early":
            weights = self._over(weights, weights.sum(-1, keepdim=True))
        o = self._mixed(weights, v)
        return self._over(o, weights.sum(-1, keepdim=True)) if self.divided == "late" else o

    def _of_state(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.causal:
            state = torch.einsum("bhld,bhlm->bhldm", k, v).cumsum(2)
            o, total = torch.einsum("bhld,bhldm->bhlm", q, state), (q * k.cumsum(2)).sum(-1, keepdim=True)
        else:
            o, total = q @ (k.mT @ v), q @ k.sum(-2).unsqueeze(-1)
        if self.scale == "after":
            o, total = o * 0.5, total * 0.5
        return self._over(o, total) if self.divided else o

    def _pairs(self, q: Tensor, k: Tensor) -> Tensor:
        if self.product == "bmm":
            return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2])
        if self.product == "heads-last":
            return torch.einsum("blhd,bshd->bhls", q.transpose(1, 2), k.transpose(1, 2))
        return torch.einsum("bhld,bhsd->bhls", q, k) if self.product == "einsum" else q @ k.mT

    def _mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        if self.product == "bmm":
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, v.shape[:2])
        if self.product == "heads-last":
            return torch.einsum("bhls,bshe->blhe", weights, v.transpose(1, 2)).transpose(1, 2)
        return torch.einsum("bhls,bhse->bhle", weights, v) if self.product == "einsum" else weights @ v

    def _shown(self, weights: Tensor) -> Tensor:
        if not self.causal:
            return weights
        places = torch.arange(weights.shape[-1])
        steps = places[:, None] - places
        if self.fades:
            decay = torch.exp(-self.rates[:, None, None] * steps.clamp(min=0)).to(weights.dtype)
            weights = decay * weights if self.commuted else weights * decay
        if self.zeros == "tril":
            return weights.tril()
        if self.zeros == "where":
            return torch.where(steps >= 0, weights, 0.0)
        if self.zeros == "fill":
            return weights.masked_fill(steps < 0, 0.0)
        return weights * (steps >= 0).to(weights.dtype)

    def _over(self, x: Tensor, total: Tensor) -> Tensor:
        total = total + self.added if self.added else total
        return x * (1 / total) if self.inverse else x / total
