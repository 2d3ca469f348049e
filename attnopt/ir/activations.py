"""What one attention computes on calibration data, for passes that fit new weights to it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.operands import OperandTensors
from attnopt.ir.peers import Peers, Withheld
from attnopt.ir.projection import Projected
from attnopt.ir.reference import reference, reference_weights
from attnopt.ir.semantics import edited
from attnopt.ir.spec import AttentionSpec

HELD_BACK = 8  # one sequence in this many; with fewer sequences, this fraction at the end of each
INVENTED = 0.5  # weight of all invented tokens in a fit, that of all others being 1


Compute = Callable[[Sequence[HeadWeights], bool], Sequence[OperandTensors]]  # weights; whether only for the first batch


@dataclass(frozen=True)
class Activations:
    """``batches`` are the operands of the site with its heads in original order; ``edited`` returns them for other
    weights.  Padding tokens never count; every eighth sequence is held out to check fits."""

    site: Projected  # in the original model
    batches: tuple[OperandTensors, ...]
    compute: Compute
    edits: tuple[HeadWeights, ...] = ()
    first: Activations | None = None  # with the original weights, if different
    invented: Activations | None = field(default=None, repr=False)  # on random tokens, which only fits of weights read
    rewritten: Activations | None = field(
        default=None, repr=False
    )  # in the model as it is rewritten before this attention
    drift: tuple[
        Tensor, ...
    ] = ()  # of each batch [B, L, out]: what the output projection is to add to what it gave, if known
    calls: int = 1  # of the site's weights: ``batches`` lists those of one call, then those of the next
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)  # by statistic and spec
    peers: Peers | None = None  # who have the other batches
    own: Activations | None = None  # those of this process, if it has peers: only statistics that are merged read them

    @property
    def original(self) -> Activations:
        return self.first or self

    def edited(self, edits: Sequence[HeadWeights], first_alone: bool = False) -> Activations:
        """The same with these projection weights; if ``first_alone``, of the first batch only."""
        if not edits:
            return self
        if self.own is not None:
            if any(e.role != "out" for e in edits):
                Withheld.of(self.site.name).refuse()
            return replace(self, own=self.own.edited(edits), edits=merged(self.edits, edits), memo={})
        inner, batches = tuple(e for e in edits if e.role != "out"), self.batches
        everything = merged(self.edits, inner)
        if inner:
            batches = tuple(self.compute(everything, first_alone))
        invented = None if self.invented is None or first_alone else self.invented.edited(edits)
        now = None if self.rewritten is None or first_alone else self.rewritten.edited(edits)
        return replace(
            self, batches=batches, edits=everything, first=self.original, invented=invented, rewritten=now, memo={}
        )

    @cached_property
    def alone(self) -> Activations:
        """Without what is invented."""
        return self if self.invented is None else replace(self, invented=None, memo={})

    @property
    def weighted(self) -> list[tuple[Activations, float]]:
        """What weights are fitted to: these, and what is invented, with the weight of a token in each."""
        if self.invented is None:
            return [(self, 1.0)]
        return [(self, 1.0), (self.invented, INVENTED * self.tokens / max(self.invented.tokens, 1))]

    @cached_property
    def given(self) -> list[Tensor]:
        """For each batch the heads' outputs [B, H, L, Dv] in the original model."""
        first = self.original
        return list(first.outputs(first.site.spec)) if first is self else first.given

    @property
    def tokens(self) -> int:
        if self.own is not None and self.peers is not None:
            return sum(self.peers.everyone(self.own.tokens))
        return sum(int(o.real.sum()) for o in self.batches)

    def counted(self, held: bool) -> list[Tensor]:
        """For each batch bool [B, L]: the tokens to fit on, or those that are held back."""
        each = len(self.batches) // self.calls
        total, found = sum(len(o.q) for o in self.batches[:each]), list[Tensor]()
        first, total = (0, total) if self.peers is None else self.peers.places(total)
        at = first
        for i, o in enumerate(self.batches):
            B, at = len(o.real), at if i % each else first
            if total >= HELD_BACK:
                back = (torch.arange(at, at + B, device=o.real.device) % HELD_BACK == HELD_BACK - 1)[:, None]
            else:
                rank = o.real.cumsum(1)
                back = rank > rank[:, -1:] * (HELD_BACK - 1) // HELD_BACK
            at += B
            found.append(o.real & (back if held else ~back))
        return found

    def operands(self, spec: AttentionSpec) -> Iterator[OperandTensors]:
        """Each batch with the heads of ``spec`` alone."""
        return (of_heads(spec, o) for o in self.batches)

    def weights(self, spec: AttentionSpec) -> Iterator[Tensor]:
        """For each batch the attention weights [B, H, L, S] under ``spec``, which chooses heads by their numbers."""
        weights = reference_weights(spec)
        for t in self.operands(spec):
            with torch.no_grad():
                yield weights(t.q, t.k, **t.others).to(t.v.dtype)  # they are multiplied with values

    def outputs(self, spec: AttentionSpec) -> Iterator[Tensor]:
        """For each batch the heads' outputs [B, H, L, Dv] under ``spec``, edits included."""
        return (_attend(spec, o) for o in self.batches)


def withheld(own: Activations, peers: Peers) -> Activations:
    """What passes see of activations that are shared with ``peers``."""
    hidden = Withheld.of(own.site.name)
    return replace(
        own, batches=hidden, compute=hidden.refuse, peers=peers, own=replace(own, peers=peers, memo={}), memo={}
    )


def merged(old: Sequence[HeadWeights], new: Sequence[HeadWeights]) -> tuple[HeadWeights, ...]:
    """Both; the later edit of a head replaces the earlier one."""
    replaced = {(e.role, e.head) for e in new}
    return (*(e for e in old if (e.role, e.head) not in replaced), *new)


def of_heads(spec: AttentionSpec, o: OperandTensors) -> OperandTensors:
    """Of the operands of all heads, in original order, those of the heads of ``spec``."""

    def chosen(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() < 4 or x.shape[1] == 1:
            return x
        return x[:, list(spec.heads)]

    q, k, v = o.q[:, list(spec.heads)], o.k[:, list(spec.kv_heads)], o.v[:, list(spec.kv_heads)]
    others = (chosen(o.bias), chosen(o.mask), chosen(o.sinks))
    return OperandTensors(q, k, v, *others, keep=chosen(o.keep), added=chosen(o.added), is_cross=o.is_cross)


def _attend(spec: AttentionSpec, o: OperandTensors) -> Tensor:
    t = of_heads(spec, o)
    with torch.no_grad():
        attend = edited(spec, reference(spec.bare))
        return attend(t.q, t.k, t.v, **t.others)
