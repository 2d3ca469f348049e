"""Between whole tensors and those of a rank's own tokens: modules, so that a graph can call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attnopt.base.intervals import Ranges
from attnopt.distributed.ranks import Ranks
from attnopt.distributed.shards import Shards
from attnopt.distributed.token_rules import Tokens


class TakeOwn(nn.Module):
    """The rank's own tokens of a whole tensor, which every rank has."""

    def __init__(self, shards: Shards, rank: int, at: Tokens) -> None:
        super().__init__()
        self.positions, self.length, self.at = shards.positions[rank], shards.length, at

    def forward(self, x: Tensor) -> Tensor:
        return taken(x, self.positions, self.length, self.at)

    def extra_repr(self) -> str:
        return f"axis {self.at.axis}"


def taken(x: Tensor, positions: Ranges, length: int, at: Tokens) -> Tensor:
    split = _split(x, at, length)
    parts = [split.narrow(at.axis + 1, start, stop - start) for start, stop in positions]
    return torch.cat(parts, at.axis + 1).flatten(at.axis, at.axis + 2)


def _split(x: Tensor, at: Tokens, length: int) -> Tensor:
    return x.reshape(*x.shape[: at.axis], at.outer, length, at.inner, *x.shape[at.axis + 1 :])


class Collect(nn.Module):
    """The whole tensor, of which each rank has its own tokens."""

    def __init__(self, shards: Shards, ranks: Ranks, at: Tokens, name: str) -> None:
        super().__init__()
        self.shards, self.ranks, self.at, self.name = shards, ranks, at, name

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Collect.apply(x, self)  # type: ignore[no-untyped-call]
        return found

    def extra_repr(self) -> str:
        return f"axis {self.at.axis}"


class _Collect(torch.autograd.Function):
    """The gradient of each token is the sum of what all ranks have for it: they minimize the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Collect) -> Tensor:
        ctx.how = how
        at, shards, ranks = how.at, how.shards, how.ranks
        own = _split(x, at, shards.count(ranks.rank)).movedim(at.axis + 1, 0)
        padded = own.new_zeros(shards.longest, *own.shape[1:])
        padded[: len(own)] = own
        whole = own.new_empty(shards.length, *own.shape[1:])
        for rank, given in enumerate(ranks.padded(padded, how.name)):
            before = 0
            for start, stop in shards.positions[rank]:
                whole[start:stop] = given[before : before + stop - start]
                before += stop - start
        joined: Tensor = whole.movedim(0, at.axis + 1).flatten(at.axis, at.axis + 2)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        how: Collect = ctx.how
        summed = how.ranks.summed(grad.contiguous().clone(), f"{how.name} (backward)")
        return taken(summed, how.shards.positions[how.ranks.rank], how.shards.length, how.at), None
