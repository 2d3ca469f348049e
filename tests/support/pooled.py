"""Pools of keys, told apart from attnopt: which keys they hold, and what a model gives with them."""

from __future__ import annotations

from itertools import product

import oracle
import tiny_models
import torch
from torch import Tensor, nn

from attnopt.ir.pooled_keys import PooledKeys


def pools_of(p: PooledKeys, S: int) -> list[list[int]]:
    """The keys of each pool, in the order of the pools."""
    found = [[j] for j in range(p.prefix)]
    sides = p.grid or (S - p.prefix,)
    for corner in product(*(range(0, n, r) for n, r in zip(sides, p.size, strict=True))):
        tokens = product(*(range(c, c + r) for c, r in zip(corner, p.size, strict=True)))
        found.append([p.prefix + flat(token, sides) for token in tokens])
    assert sorted(j for pool in found for j in pool) == list(range(S))
    return found


def flat(token: tuple[int, ...], sides: tuple[int, ...]) -> int:
    place = 0
    for c, n in zip(token, sides, strict=True):
        place = place * n + c
    return place


def means(p: PooledKeys, S: int, heads: int) -> Tensor:
    """What the oracle is told: for each head and key, the weights of the keys of its pool."""
    found = torch.eye(S).repeat(heads, 1, 1)
    for pool in pools_of(p, S):
        for h, i, j in product(p.heads, pool, pool):
            found[h, i, j] = 1 / len(pool)
    return found


def full() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return tiny_models.Attention(width=32, heads=4, causal=False).eval(), torch.randn(2, 12, 32)


def pooled_by_hand(model: nn.Module, x: Tensor, p: PooledKeys) -> list[Tensor]:
    return oracle.run_edited(model, (x,), None, {0: oracle.Edit(pools=means(p, x.shape[1], 4))})
