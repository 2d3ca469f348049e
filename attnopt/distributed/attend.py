"""One attention over the tokens of several ranks: each computes its own queries, and keys and values travel.

Rounds are merged by their log-sum-exps, as in ring attention (arXiv:2310.01889); the backward pass sends keys and values once
more and computes each round again, so no rank ever holds those of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attnopt.backends.attention_operator import ATTENTION_WITH_LSE
from attnopt.base.intervals import Ranges, merged
from attnopt.distributed.ranks import Exchange, Ranks
from attnopt.distributed.shards import Rounds, Shards
from attnopt.ir.lse_merge import finite, joined
from attnopt.patterns.algebra import FULL, Pattern
from attnopt.patterns.part import Part, count


@dataclass(frozen=True, eq=False)
class Attention:
    """What an attention computes, and how its ranks share it.  ``site``: its name."""

    site: str
    pattern: Pattern
    kv_of_head: tuple[int, ...]
    scale: float
    softcap: float | None
    rounds: Rounds
    ranks: Ranks

    @property
    def shards(self) -> Shards:
        return self.rounds.shards

    def seen(self, keys: Ranges) -> Pattern:
        """What the own queries see of these keys."""
        if self.pattern == FULL:
            return FULL
        return Part(self.pattern, self.shards.positions[self.ranks.rank], keys, self.shards.length)


@dataclass(frozen=True, eq=False)
class OwnOperands:
    """Of one rank: q [B, H, l, D], k [B, G, l, D], v [B, G, l, Dv] of its own tokens; bias and mask [B|1, H|1, l|1, S|1] and
    segments of the keys [B|1, S] of all S keys; segments of the queries [B|1, l]; sinks [B|1, H|1, l|1, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    pairs: Tensor | None = None


class Attend(nn.Module):
    """Calls ``attend``; a module, so that a graph can call it."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *operands: Tensor | None) -> Tensor:
        return attend(self.attention, OwnOperands(*operands))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.attention.site}, {self.attention.rounds.method}, {self.attention.pattern}"


def attend(attention: Attention, t: OwnOperands) -> Tensor:
    """[B, H, l, Dv]: the output of the own queries over the keys of all ranks.  Every rank of the group calls this."""
    beside = (t.mask, t.q_segments, t.kv_segments, t.pairs)
    o: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        t.q, t.k, t.v, t.bias, t.sinks, attention, *beside
    )
    return o


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        attention: Attention,
        *beside: Any,
    ) -> Tensor:
        mask, *segments = beside
        t = OwnOperands(q, k, v, bias, mask, sinks, *segments)
        so_far = Merged.of(t)
        for step in _rounds(attention, t):
            so_far = so_far.with_part(*_part(attention, t, step))
        ctx.attention = attention
        o = so_far.o.to(v.dtype)
        ctx.save_for_backward(q, k, v, bias, sinks, *beside, so_far.o, so_far.top, so_far.log_sum)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attention: Attention = ctx.attention
        q, k, v, bias, sinks, mask, *segments, o, top, log_sum = ctx.saved_tensors
        t, whole = OwnOperands(q, k, v, bias, mask, sinks, *segments), Merged(o, top, log_sum)
        wide = grad.to(o.dtype)
        found = Gradients.of(t, (wide * o).sum(-1))
        for number, step in enumerate(_rounds(attention, t)):
            kv = found.add(attention, t, step, whole, wide)
            for places, given in _return(attention, number, step, kv):
                found.add_keys(places, given)
        needed = ctx.needs_input_grad
        made = (found.q, found.k, found.v, found.bias, found.of_sinks(t, whole))
        grads = (None if x is None or not n else x.to(t.q.dtype) for x, n in zip(made, needed, strict=False))
        return (*grads, *[None] * 5)


@dataclass(frozen=True, eq=False)
class Merged:
    """The output of the keys so far, in float32 or wider, and the two parts of its log-sum-exp, as in ``AttendWithLse``."""

    o: Tensor
    top: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, t: OwnOperands) -> Merged:
        """Without keys: sinks alone."""
        wide = torch.promote_types(t.q.dtype, torch.float32)
        o = t.q.new_zeros(*t.q.shape[:3], t.v.shape[3], dtype=wide)
        top = o.new_full(o.shape[:3], -torch.inf)
        if t.sinks is not None:
            top = t.sinks.to(wide).squeeze(-1).expand_as(top)
        return cls(o, top, torch.zeros_like(top))

    def with_part(self, o: Tensor, top: Tensor, log_sum: Tensor) -> Merged:
        """Together with the output over other keys."""
        weights, *both = joined([self.top, top], [self.log_sum, log_sum])
        mine, theirs = (w.unsqueeze(-1) for w in weights)
        return Merged(mine * self.o + theirs * o.to(self.o.dtype), *both)

    def share(self, top: Tensor, log_sum: Tensor) -> Tensor:
        """The weight of a part in the softmax over all keys."""
        return torch.exp((top - finite(self.top)) + (log_sum - self.log_sum))


@dataclass(eq=False)
class Gradients:
    """Of the own operands, in float32 or wider.  ``of_row``: the products of output and its gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    of_row: Tensor

    @classmethod
    def of(cls, t: OwnOperands, of_row: Tensor) -> Gradients:
        q, k, v = (torch.zeros_like(x, dtype=of_row.dtype) for x in (t.q, t.k, t.v))
        bias = None if t.bias is None else torch.zeros_like(t.bias, dtype=of_row.dtype)
        return cls(q, k, v, bias, of_row)

    def add(
        self, attention: Attention, t: OwnOperands, step: Step, whole: Merged, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the keys of one round give the own queries and bias; returned: the gradients of these keys and values."""
        if not step.keys:
            return step.k, step.v
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (t.q, step.k, step.v)]
            bias = None if t.bias is None else _columns(t.bias, step.keys).detach().requires_grad_()
            leaves += [] if bias is None else [bias]
            own = Step(step.sources, step.keys, leaves[1], leaves[2])
            o, top, log_sum = _part(attention, t, own, leaves[0], bias)
            share = whole.share(top.detach(), log_sum.detach())
            of_lse = share * ((grad * o.detach().to(grad.dtype)).sum(-1) - self.of_row)
            grads = ((share.unsqueeze(-1) * grad).to(o.dtype), of_lse.to(log_sum.dtype))
            q, k, v, *of_bias = torch.autograd.grad(
                (o, log_sum), leaves, grads, allow_unused=True, materialize_grads=True
            )
        self.q += q
        if self.bias is not None:
            _add_columns(self.bias, step.keys, of_bias[0])
        return k, v

    def add_keys(self, places: Ranges, kv: Tensor) -> None:
        size = self.k.shape[3]
        for own, given in ((self.k, kv[..., :size]), (self.v, kv[..., size:])):
            _add(own, 2, places, given)

    def of_sinks(self, t: OwnOperands, whole: Merged) -> Tensor | None:
        if t.sinks is None:
            return None
        logits = t.sinks.to(self.of_row.dtype).squeeze(-1).expand_as(self.of_row)
        found = -whole.share(logits, torch.zeros_like(logits)) * self.of_row
        return found.unsqueeze(-1).sum_to_size(t.sinks.shape)


@dataclass(frozen=True, eq=False)
class Step:
    """The keys of one round, at the positions ``keys``, in their order, from the ranks of ``sources``."""

    sources: Mapping[int, Ranges]
    keys: Ranges
    k: Tensor
    v: Tensor


def _rounds(attention: Attention, t: OwnOperands) -> Iterator[Step]:
    """The rounds of this rank; the next keys travel while those of a round are used."""
    following = _send(attention, t, 0)
    for number in range(len(attention.rounds.of)):
        arriving = following
        if number + 1 < len(attention.rounds.of):
            following = _send(attention, t, number + 1)
        yield _joined(attention, t, number, arriving.wait())


def _send(attention: Attention, t: OwnOperands, number: int) -> Exchange:
    rounds, ranks = attention.rounds, attention.ranks
    kind = torch.promote_types(t.k.dtype, t.v.dtype)
    sent = {
        other: torch.cat([_chosen(x.to(kind), 2, rounds.shards.places(ranks.rank, tokens)) for x in (t.k, t.v)], -1)
        for other, tokens in rounds.sent(number, ranks.rank).items()
    }
    B, G, _, width = t.k.shape
    heard = {
        source: t.k.new_empty(B, G, count(tokens), width + t.v.shape[3], dtype=kind)
        for source, tokens in rounds.of[number][ranks.rank].items()
        if source != ranks.rank
    }
    return ranks.exchange(sent, heard, attention.site)


def _joined(attention: Attention, t: OwnOperands, number: int, arrived: Mapping[int, Tensor]) -> Step:
    """The keys of a round in the order of their positions."""
    rank, width = attention.ranks.rank, t.k.shape[3]
    sources = attention.rounds.of[number][rank]
    pieces: list[tuple[int, Tensor, Tensor]] = []
    for source, tokens in sources.items():
        own = source == rank
        before = 0
        for start, stop in tokens:
            if own:
                ((a, b),) = attention.shards.places(rank, ((start, stop),))
                pieces.append((start, t.k[:, :, a:b], t.v[:, :, a:b]))
                continue
            part = arrived[source][:, :, before : before + stop - start]
            pieces.append((start, part[..., :width].to(t.k.dtype), part[..., width:].to(t.v.dtype)))
            before += stop - start
    pieces.sort(key=lambda piece: piece[0])
    keys = merged(run for tokens in sources.values() for run in tokens)
    if len(pieces) == 1:
        return Step(sources, keys, pieces[0][1], pieces[0][2])
    if not pieces:
        return Step(sources, keys, t.k[:, :, :0], t.v[:, :, :0])
    return Step(sources, keys, torch.cat([k for _, k, _ in pieces], 2), torch.cat([v for _, _, v in pieces], 2))


def _return(
    attention: Attention, number: int, step: Step, kv: tuple[Tensor, Tensor]
) -> Iterator[tuple[Ranges, Tensor]]:
    """Send the gradients of keys back to where these come from; what all ranks have for the own keys, and their places."""
    ranks, both = attention.ranks, torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)) for x in kv], -1)
    of_source = {source: _columns_of(both, step.keys, tokens) for source, tokens in step.sources.items()}
    mine = of_source.pop(ranks.rank, None)
    B, G, _, width = both.shape
    sent = attention.rounds.sent(number, ranks.rank)
    heard = {other: both.new_empty(B, G, count(tokens), width) for other, tokens in sent.items()}
    on_its_way = ranks.exchange(of_source, heard, f"{attention.site} (backward)")
    if mine is not None:
        yield attention.shards.places(ranks.rank, step.sources[ranks.rank]), mine
    for other, given in on_its_way.wait().items():
        yield attention.shards.places(ranks.rank, sent[other]), given


def _part(
    attention: Attention, t: OwnOperands, step: Step, q: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The own queries over the keys of one round."""
    q = t.q if q is None else q
    if not step.keys:
        nothing = Merged.of(OwnOperands(q, t.k, t.v))
        return nothing.o, nothing.top, nothing.log_sum
    bias = _columns(t.bias, step.keys) if bias is None and t.bias is not None else bias
    mask = None if t.mask is None else _columns(t.mask, step.keys)
    of_keys = None if t.kv_segments is None else _columns(t.kv_segments, step.keys)
    options = (attention.seen(step.keys).to_json(), attention.kv_of_head, attention.scale, attention.softcap, None)
    o, top, log_sum = ATTENTION_WITH_LSE(q, step.k, step.v, bias, mask, None, *options, t.q_segments, of_keys, t.pairs)
    return o, top, log_sum


def _columns(x: Tensor, keys: Ranges) -> Tensor:
    """Of these keys, if ``x`` has one entry for each."""
    return x if x.shape[-1] == 1 else _chosen(x, -1, keys)


def _columns_of(x: Tensor, keys: Ranges, chosen: Ranges) -> Tensor:
    """Of the tokens ``chosen`` among ``keys``, along axis 2."""
    held = Shards(keys[-1][1], (keys,))
    return _chosen(x, 2, held.places(0, chosen))


def _chosen(x: Tensor, axis: int, places: Ranges) -> Tensor:
    parts = [x.narrow(axis, start, stop - start) for start, stop in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _add(to: Tensor, axis: int, places: Ranges, given: Tensor) -> None:
    before = 0
    for start, stop in places:
        to.narrow(axis, start, stop - start).add_(given.narrow(axis, before, stop - start))
        before += stop - start


def _add_columns(to: Tensor, keys: Ranges, given: Tensor) -> None:
    if to.shape[-1] == 1:
        to += given
    else:
        _add(to, -1, keys, given)
