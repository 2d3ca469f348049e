"""One attention over the tokens of several ranks: each computes its own queries, and keys and values travel.

Rounds are merged by their log-sum-exps, as in ring attention (arXiv:2310.01889); the backward pass sends keys and values once
more and computes each round again, so no rank ever holds those of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attnopt.backends.attention_operator import ATTENTION_WITH_LSE
from attnopt.base.intervals import Ranges
from attnopt.distributed.key_rounds import Attention, OwnOperands, Step, chosen, returned, rounds
from attnopt.ir.lse_merge import finite, joined


class Attend(nn.Module):
    """Calls ``attend``; a module, so that a graph can call it."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *operands: Tensor | None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return attend(self.attention, OwnOperands(*operands))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.attention.site}, {self.attention.rounds.method}, {self.attention.pattern}"


def attend(attention: Attention, t: OwnOperands) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """[B, H, l, Dv]: the output of the own queries over the keys of all ranks; ``with_lse``: and the two parts of its log-sum-exp
    [B, H, l].  Every rank of the group calls this."""
    beside = (t.mask, t.q_segments, t.kv_segments, t.pairs)
    o, top, log_sum = _Attend.apply(  # type: ignore[no-untyped-call]
        t.q, t.k, t.v, t.bias, t.sinks, attention, *beside
    )
    return (o, top, log_sum) if attention.with_lse else o


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask, *segments = beside
        t = OwnOperands(q, k, v, bias, mask, sinks, *segments)
        so_far = Merged.of(t)
        for step in rounds(attention, t):
            so_far = so_far.with_part(*_part(attention, t, step))
        ctx.attention = attention
        o = so_far.o.to(v.dtype)
        ctx.save_for_backward(q, k, v, bias, sinks, *beside, so_far.o, so_far.top, so_far.log_sum)
        ctx.mark_non_differentiable(so_far.top)  # a constant beside the sum relative to it
        return o, so_far.top, so_far.log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor, of_log_sum: Tensor) -> tuple[Tensor | None, ...]:
        attention: Attention = ctx.attention
        q, k, v, bias, sinks, mask, *segments, o, top, log_sum = ctx.saved_tensors
        t, whole = OwnOperands(q, k, v, bias, mask, sinks, *segments), Merged(o, top, log_sum)
        wide = grad.to(o.dtype)
        found = Gradients.of(t, (wide * o).sum(-1) - of_log_sum)
        for number, step in enumerate(rounds(attention, t)):
            kv = found.add(attention, t, step, whole, wide)
            for places, given in returned(attention, number, step, kv):
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
    """Of the own operands, in float32 or wider.  ``of_row``: the products of output and its gradient, less the gradient of the
    log-sum-exp."""

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
    return x if x.shape[-1] == 1 else chosen(x, -1, keys)


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
