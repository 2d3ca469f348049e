"""One attention over the tokens of several ranks by heads: each computes some heads over all tokens (DeepSpeed-Ulysses,
arXiv:2309.14509).

Queries, keys and values travel from tokens to heads, outputs back; the backward pass sends their gradients the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attnopt.backends.attention_operator import ATTENTION
from attnopt.distributed.key_rounds import OwnOperands
from attnopt.distributed.ranks import Ranks
from attnopt.distributed.shards import Shards
from attnopt.distributed.traffic import Arriving, Sizes
from attnopt.patterns.algebra import Pattern

ByRank = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class HeadShares:
    """``heads`` and ``kv_heads``: those that each rank computes, over all tokens.  Heads that read one key/value head stay
    together."""

    method: ClassVar[str] = "all-to-all"
    shards: Shards
    heads: ByRank
    kv_heads: ByRank

    @classmethod
    def of(cls, kv_of_head: Sequence[int], shards: Shards) -> HeadShares | None:
        """The largest groups first, each to a rank with the fewest heads so far; None if there are fewer groups than ranks."""
        groups: dict[int, list[int]] = {}
        for head, kv in enumerate(kv_of_head):
            groups.setdefault(kv, []).append(head)
        if len(groups) < shards.ranks:
            return None
        heads: list[list[int]] = [[] for _ in range(shards.ranks)]
        kv_heads: list[list[int]] = [[] for _ in range(shards.ranks)]
        for kv, own in sorted(groups.items(), key=lambda group: -len(group[1])):
            rank = min(range(shards.ranks), key=lambda r: len(heads[r]))
            heads[rank] += own
            kv_heads[rank].append(kv)
        return cls(shards, *(tuple(tuple(sorted(own)) for own in by_rank) for by_rank in (heads, kv_heads)))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Keys that each rank is sent, of its own heads."""
        return tuple(self.shards.length - own for own in self.shards.counts)

    def arriving(self, sizes: Sizes) -> Arriving:
        """What each rank is sent: its heads of all tokens, then all heads of its tokens."""
        ranks, counts = range(self.shards.ranks), np.array(self.shards.counts, np.int64)
        own = np.array([sizes.of_operands(len(self.heads[r]), len(self.kv_heads[r])) for r in ranks], np.int64)
        back = np.array([sizes.of_output(sizes.heads - len(self.heads[r])) for r in ranks], np.int64)
        steps = np.stack([(self.shards.length - counts) * own, counts * back])
        return Arriving(np.full_like(steps, len(ranks) - 1), steps)

    def workspace(self, sizes: Sizes) -> int:
        """Bytes that a rank holds at most beside its own operands: those of its heads, what is on its way, and their output."""
        most = max(range(self.shards.ranks), key=lambda r: len(self.heads[r]))
        own = len(self.heads[most])
        return self.shards.length * (2 * sizes.of_operands(own, len(self.kv_heads[most])) + sizes.of_output(own))


@dataclass(frozen=True, eq=False)
class HeadAttention:
    """What an attention computes, and which heads each rank computes.  ``site``: its name."""

    site: str
    pattern: Pattern
    kv_of_head: tuple[int, ...]
    scale: float
    softcap: float | None
    shares: HeadShares
    ranks: Ranks

    @property
    def own(self) -> tuple[int, ...]:
        return self.shares.heads[self.ranks.rank]

    @property
    def own_kv(self) -> tuple[int, ...]:
        return self.shares.kv_heads[self.ranks.rank]


class AttendByHeads(nn.Module):
    """Operands as of ``Attend``, but bias, mask, sinks and segments of all tokens, the same for every query."""

    def __init__(self, attention: HeadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *operands: Tensor | None) -> Tensor:
        a, t = self.attention, OwnOperands(*operands)  # type: ignore[arg-type]
        q, k, v = _ToHeads.apply(a, t.q, t.k, t.v)  # type: ignore[no-untyped-call]
        bias, mask, sinks = (_of_heads(x, a.own, 1) for x in (t.bias, t.mask, t.sinks))
        reads = [a.own_kv.index(a.kv_of_head[head]) for head in a.own]
        options = (a.pattern.for_heads(a.own).to_json(), reads, a.scale, a.softcap, None, None)
        pairs = _of_heads(t.pairs, a.own, 0)
        o = ATTENTION(q, k, v, bias, mask, sinks, *options, t.q_segments, t.kv_segments, pairs)
        own: Tensor = _ToTokens.apply(a, o)  # type: ignore[no-untyped-call]
        return own

    def extra_repr(self) -> str:
        return f"{self.attention.site}, {self.attention.shares.method}, {self.attention.pattern}"


class _ToHeads(torch.autograd.Function):
    """q, k, v [B, heads, own tokens, D] to [B, own heads, tokens, D]."""

    @staticmethod
    def forward(ctx: Any, a: HeadAttention, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.a, ctx.counts = a, [x.shape[1] for x in qkv]
        return tuple(_to_heads(a, qkv, a.site))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_to_tokens(ctx.a, grads, ctx.counts, f"{ctx.a.site} (backward)")


class _ToTokens(torch.autograd.Function):
    """The other way, for the output."""

    @staticmethod
    def forward(ctx: Any, a: HeadAttention, o: Tensor) -> Tensor:
        ctx.a = a
        return _to_tokens(a, (o,), [len(a.kv_of_head)], a.site)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _to_heads(ctx.a, (grad,), f"{ctx.a.site} (backward)")[0]


def _to_heads(a: HeadAttention, xs: Sequence[Tensor], what: str) -> list[Tensor]:
    """``xs``: queries, or what has as many heads, then what has the heads of keys."""
    rank, shards, of = a.ranks.rank, a.shares.shards, (a.shares.heads, *[a.shares.kv_heads] * (len(xs) - 1))
    sent = {other: _packed([x[:, list(heads[other])] for x, heads in zip(xs, of, strict=True)]) for other in _others(a)}
    shapes = {
        source: [(len(x), len(heads[rank]), shards.count(source), x.shape[3]) for x, heads in zip(xs, of, strict=True)]
        for source in _others(a)
    }
    arrived = _exchanged(a, xs, sent, shapes, what)
    arrived[rank] = [x[:, list(heads[rank])] for x, heads in zip(xs, of, strict=True)]
    made = [x.new_empty(len(x), len(heads[rank]), shards.length, x.shape[3]) for x, heads in zip(xs, of, strict=True)]
    for source, parts in arrived.items():
        for whole, part in zip(made, parts, strict=True):
            before = 0
            for start, stop in shards.positions[source]:
                whole[:, :, start:stop] = part[:, :, before : before + stop - start]
                before += stop - start
    return made


def _to_tokens(a: HeadAttention, xs: Sequence[Tensor], counts: Sequence[int], what: str) -> list[Tensor]:
    """``counts``: how many heads each of ``xs`` has on all ranks together; those that no rank has are zeros."""
    rank, shards, of = a.ranks.rank, a.shares.shards, (a.shares.heads, *[a.shares.kv_heads] * (len(xs) - 1))
    own = shards.count(rank)

    def of_rank(x: Tensor, other: int) -> Tensor:
        return torch.cat([x[:, :, start:stop] for start, stop in shards.positions[other]], 2)

    sent = {other: _packed([of_rank(x, other) for x in xs]) for other in _others(a)}
    shapes = {
        source: [(len(x), len(heads[source]), own, x.shape[3]) for x, heads in zip(xs, of, strict=True)]
        for source in _others(a)
    }
    arrived = _exchanged(a, xs, sent, shapes, what)
    arrived[rank] = [of_rank(x, rank) for x in xs]
    made = [x.new_zeros(len(x), n, own, x.shape[3]) for x, n in zip(xs, counts, strict=True)]
    for source, parts in arrived.items():
        for whole, part, heads in zip(made, parts, of, strict=True):
            whole[:, list(heads[source])] = part
    return made


Shape = tuple[int, int, int, int]


def _exchanged(
    a: HeadAttention, xs: Sequence[Tensor], sent: dict[int, Tensor], shapes: dict[int, list[Shape]], what: str
) -> dict[int, list[Tensor]]:
    """What other ranks send, in these shapes: one message from each."""
    sizes = {source: [torch.Size(shape).numel() for shape in own] for source, own in shapes.items()}
    heard = {source: xs[0].new_empty(sum(own), dtype=_joint_dtype(xs)) for source, own in sizes.items()}
    arrived = a.ranks.exchange(sent, heard, what).wait()
    return {
        source: [
            part.view(shape).to(x.dtype)
            for part, shape, x in zip(torch.split(flat, sizes[source]), shapes[source], xs, strict=True)
        ]
        for source, flat in arrived.items()
    }


def _packed(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.to(_joint_dtype(xs)).flatten() for x in xs])


def _joint_dtype(xs: Sequence[Tensor]) -> torch.dtype:
    joint = xs[0].dtype
    for x in xs:
        joint = torch.promote_types(joint, x.dtype)
    return joint


def _others(a: HeadAttention) -> list[int]:
    return [rank for rank in range(a.ranks.size) if rank != a.ranks.rank]


def _of_heads(x: Tensor | None, heads: Sequence[int], axis: int) -> Tensor | None:
    """What belongs to these heads, if ``x`` tells heads apart."""
    if x is None or x.shape[axis] == 1:
        return x
    return x.index_select(axis, torch.tensor(heads, device=x.device))
