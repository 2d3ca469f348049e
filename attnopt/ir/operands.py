"""What one attention is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor, fx

T = TypeVar("T")
U = TypeVar("U")
ROLES = ("q", "k", "v", "bias", "mask", "sinks")  # the operands of an attention operator, in their order
CANONICAL = (*ROLES, "keep", "added", "score_map", "weight_map")  # those of the canonical attention
HIDING = -9e3  # a bias below this, or below it beside the row's highest, hides: models write -1e4, -1e9 or -inf
BLOCK = 64  # queries and keys per block of a selection


@dataclass(frozen=True)
class Operands(Generic[T]):
    """Nodes of a graph, tensors, or values of a file.

    q [B, H, L, D], k [B, G, S, D], v [B, G, S, Dv]; bias and mask broadcast to [B, H, L, S], sinks to [B, H, L, 1]; keep, which
    multiplies the weights, to [B, H, L, 1], and added, a map, to [B, H, L, S] with all S keys.  score_map and weight_map are
    [1, H, H, 1]: each head of the result in terms of all heads.
    """

    q: T
    k: T
    v: T
    bias: T | None = None
    mask: T | None = None
    sinks: T | None = None
    keep: T | None = field(default=None, kw_only=True)
    added: T | None = field(default=None, kw_only=True)
    score_map: T | None = field(default=None, kw_only=True)
    weight_map: T | None = field(default=None, kw_only=True)

    @property
    def given(self) -> dict[str, T]:
        """Those that are there, by role."""
        return {role: x for role, x in ((role, getattr(self, role)) for role in CANONICAL) if x is not None}

    @property
    def others(self) -> dict[str, T | None]:
        """All but q, k and v: the keywords of ``Attend``, keep and added if there is a map, and maps across heads."""
        mixed = {} if self.added is None else {"keep": self.keep, "added": self.added}
        maps = {"score_map": self.score_map, "weight_map": self.weight_map}
        given = {role: x for role, x in maps.items() if x is not None}
        return {"bias": self.bias, "mask": self.mask, "sinks": self.sinks, **mixed, **given}

    @classmethod
    def of(cls, values: Sequence[T | None]) -> Operands[T]:
        """In the order of ``CANONICAL``; those at the end may be missing."""
        q, k, v, *rest = values
        assert q is not None
        assert k is not None
        assert v is not None
        return Operands(q, k, v, **dict(zip(CANONICAL[3:], rest, strict=False)))

    def map(self, make: Callable[[str, T], U]) -> Operands[U]:
        """What ``make`` gives for the role and the value of each that is there."""
        made = {role: make(role, x) for role, x in self.given.items()}
        return Operands.of([made.get(role) for role in CANONICAL])


def operands_of(call: fx.Node) -> Operands[fx.Node]:
    """The operands of a call of the canonical attention."""
    return Operands.of([x if isinstance(x, fx.Node) else None for x in call.args])


@dataclass(frozen=True)
class SegmentTensors:
    """``queries`` int [B|1, L], ``keys`` int [B|1, S]: the segment of each token, below 0 for none; ``pairs`` bool
    [H|1, R + 1, R + 1]: which segments below R see which, and the last for tokens of all others; None: each sees itself.  Of the
    parts of a partition, ``pairs`` has one more axis in front."""

    queries: Tensor
    keys: Tensor
    pairs: Tensor | None = None

    @classmethod
    def table(cls, pairs: Sequence[Iterable[tuple[int | None, int | None]] | None]) -> Tensor:
        """``pairs``, given for one head or for each; None: everything sees everything, tokens of no segment, too."""
        listed = [None if p is None else list(p) for p in pairs]
        count = 1 + max((i for p in listed for pair in p or () for i in pair if i is not None), default=-1)
        made = torch.zeros(len(listed), count + 1, count + 1, dtype=torch.bool)
        for of_head, own in zip(made, listed, strict=True):
            if own is None:
                of_head.fill_(True)
            for a, b in own or ():
                of_head[slice(None) if a is None else a, slice(None) if b is None else b] = True
        return made

    @classmethod
    def partition(cls, pairs: Sequence[Iterable[tuple[int | None, int | None]]]) -> Tensor:
        """``pairs``, given for each part but the last, which has all others; the first part that holds a pair has it."""
        own = cls.table(pairs).unsqueeze(1)
        left, parts = torch.ones_like(own[0]), []
        for of_part in own.unbind():
            parts.append(of_part & left)
            left = left & ~of_part
        return torch.stack([*parts, left])

    def numbered(self) -> SegmentTensors:
        """With numbers that are all in the table, if there is one."""
        if self.pairs is None:
            return self
        last = self.pairs.shape[-1] - 1
        wide = self.queries.long(), self.keys.long()  # the last number may be too large for theirs
        queries, keys = (torch.where((x < 0) | (x > last), last, x) for x in wide)
        return SegmentTensors(queries, keys, self.pairs)

    @property
    def parts(self) -> list[SegmentTensors]:
        """Those of a partition."""
        assert self.pairs is not None
        return [replace(self, pairs=pairs) for pairs in self.pairs.unbind()]

    def mask(self) -> Tensor:
        """Bool [B|1, H|1, L, S]"""
        if self.pairs is None:
            queries, keys = self.queries[:, None, :, None], self.keys[:, None, None, :]
            return (queries == keys) & (queries >= 0)
        own = self.numbered()
        heads, segments, _ = self.pairs.shape
        entry = own.queries.unsqueeze(2) * segments + own.keys.unsqueeze(1)  # [B, L, S]
        seen = self.pairs.reshape(heads, -1).index_select(1, entry.reshape(-1))
        return seen.reshape(heads, *entry.shape).transpose(0, 1)


@dataclass(frozen=True)
class OperandTensors(Operands[Tensor]):
    """``selected``, bool [B, H, ceil(L / BLOCK), ceil(S / BLOCK)], and ``segments`` further hide keys from queries.
    ``is_cross``: the keys are known to be those of another sequence."""

    selected: Tensor | None = None
    segments: SegmentTensors | None = None
    is_cross: bool = field(default=False, kw_only=True)

    def with_segments_masked(self) -> OperandTensors:
        """The same with a mask in the place of segments."""
        if self.segments is None:
            return self
        hidden = self.segments.mask()
        return replace(self, mask=hidden if self.mask is None else hidden & self.mask, segments=None)

    @cached_property
    def seen(self) -> Tensor:
        """Bool [B, S]: the keys that some query can see."""
        B, S = self.k.shape[0], self.k.shape[2]
        everything = torch.ones(B, S, dtype=torch.bool, device=self.k.device)
        if self.bias is None and self.mask is None:
            return everything
        bias = torch.zeros((), device=self.q.device) if self.bias is None else self.bias.float()
        if self.mask is not None:
            bias = bias + torch.zeros_like(self.mask, dtype=torch.float32).masked_fill(~self.mask, -torch.inf)
        bias = bias.expand(B, -1, -1, S)
        top = bias.amax(-1, keepdim=True)
        seen: Tensor = ((bias - top.masked_fill(top < HIDING, 0.0)).exp() > 0).flatten(1, 2).any(1)
        return seen if bool(seen.any()) else everything

    @cached_property
    def real(self) -> Tensor:
        """Bool [B, L]: the tokens that are not padding, i.e. visible to some query.

        Keys from another sequence say nothing about the queries, however many there are: every query then counts.
        """
        B, L = self.q.shape[0], self.q.shape[2]
        if self.k.shape[2] == L and not self.is_cross:
            return self.seen
        return torch.ones(B, L, dtype=torch.bool, device=self.q.device)


def selected_pairs(selected: Tensor, q_len: int, kv_len: int) -> Tensor:
    """A selection of blocks as the mask that it means, bool [B, H, L, S]."""
    B, H, rows, cols = selected.shape
    wide = selected[:, :, :, None, :, None].expand(-1, -1, -1, BLOCK, -1, BLOCK)
    return wide.reshape(B, H, rows * BLOCK, cols * BLOCK)[:, :, :q_len, :kv_len]
