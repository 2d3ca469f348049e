"""Edits that add to head outputs: constants, or the values of some tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnopt.ir.call_tensor import CallTensor, Source, of_heads, source_from_json
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import (
    HeadEdit,
    HeadMap,
    Replaced,
    Scaled,
    TowardValues,
    heads_told,
    of_tokens,
    with_heads,
    without,
)
from attnopt.ir.mixed_maps import Mixed
from attnopt.ir.tokens import only_at, positions, told
from attnopt.patterns.algebra import Full, Pattern


@dataclass(frozen=True)
class Shifted(HeadEdit):
    """``o_h[t] -> o_h[t] + by_h`` for the queries at ``tokens`` (None: all; sorted, negative from the end).

    ``by``: [heads, Dv], or what a call brings as [B or 1, heads, Dv] or [B or 1, heads, L, Dv].
    ``after_past``: the keys are earlier tokens and then those of the queries, and positions count all of them.  A position
    that a sequence does not have is ignored.
    """

    kind: ClassVar[str] = "shifted"
    fits_other_values: ClassVar[bool] = False
    heads: tuple[int, ...]
    by: Source
    tokens: tuple[int, ...] | None = None
    after_past: bool = False

    def __post_init__(self) -> None:
        shape, is_known = self.by.shape, isinstance(self.by, Constant)
        if len(shape) not in ((2,) if is_known else (3, 4)) or shape[0 if is_known else 1] != len(self.heads):
            raise ValueError(f"a shift of shape {list(shape)} for {len(self.heads)} heads")

    @property
    def changed(self) -> tuple[int, ...]:
        return self.heads

    @property
    def reads_positions(self) -> bool:
        return self.tokens is not None

    @property
    def tensors(self) -> tuple[Source, ...]:
        return (self.by,)

    @property
    def of_head(self) -> dict[int, Tensor] | None:
        """[Dv] in float64 by head, if every token of every call gets the same."""
        if self.tokens is not None or not isinstance(self.by, Constant):
            return None
        return dict(zip(self.heads, self.by.tensor().double().unbind(), strict=True))

    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        by = of_tokens(tensors[0])
        rows = {h: by[:, i : i + 1].to(o.dtype) for i, h in enumerate(self.heads)}
        nothing = torch.zeros_like(by[:, :1], dtype=o.dtype)
        moved = o + torch.cat([rows.get(h, nothing) for h in spec.heads], 1)
        return only_at(self.tokens, o, moved, v.shape[2] if self.after_past else o.shape[2])

    def keeping(self, kept: Collection[int]) -> Shifted | None:
        places = [i for i, h in enumerate(self.heads) if h in kept]
        if not places:
            return None
        return replace(self, heads=tuple(self.heads[i] for i in places), by=of_heads(self.by, places))

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        by = self.of_head
        if by is None:
            return without(known, self.heads)
        return {h: value + by[h] if h in by else value for h, value in known.items()}

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "by": self.by.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        tokens = None if data["tokens"] is None else tuple(map(int, data["tokens"]))
        return cls(tuple(map(int, data["heads"])), source_from_json(data["by"]), tokens, bool(data["after_past"]))

    def __str__(self) -> str:
        brought = f" by {self.by}" if isinstance(self.by, CallTensor) else ""
        return f"{heads_told(self.heads)} shifted{brought}{'' if self.tokens is None else ' at ' + told(self.tokens)}"


@dataclass(frozen=True)
class ValuesAdded(HeadEdit):
    """``o_h -> o_h + alpha * (the sum of v_h over the keys at ``tokens`` that the query sees)``; None: all, sorted, negative
    from the end.

    Keys are hidden by the pattern, by the mask operand, and by a bias operand of at most ``hidden_below``.  A position that a
    sequence does not have is ignored.
    """

    kind: ClassVar[str] = "values-added"
    reads_masks: ClassVar[bool] = True
    heads: tuple[int, ...]
    alpha: float
    tokens: tuple[int, ...] | None = None
    hidden_below: float | None = None

    @property
    def changed(self) -> tuple[int, ...]:
        return self.heads

    @property
    def reads_positions(self) -> bool:
        return True

    def apply(
        self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor], *,
        mask: Tensor | None = None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        queries, keys, wide = o.shape[2], v.shape[2], torch.promote_types(v.dtype, torch.float32)
        if self.tokens is None:
            at, real, chosen = torch.arange(keys, device=v.device), None, v.to(wide)
        else:
            at, real = positions(self.tokens, keys, v.device)
            chosen = v.index_select(2, at).to(wide)
        sees = [] if mask is None else [_of_keys(mask, at)]
        if bias is not None:
            if self.hidden_below is None:
                raise ValueError("a bias may hide keys, and hidden_below does not say with which numbers")
            sees.append(_of_keys(bias, at) > self.hidden_below)
        sums: dict[tuple[int, Pattern, bool | int], Tensor] = {}
        made: dict[int, Tensor] = {}
        for place in map(spec.heads.index, self.heads):
            group, pattern = spec.kv_of_head[place], spec.pattern.for_head(place)
            key = group, pattern, any(s.shape[1] != 1 for s in sees) and place
            if key not in sums:
                own = [s if s.shape[1] == 1 else s[:, place : place + 1] for s in sees]
                sums[key] = _sum(chosen[:, group : group + 1], [real, _seen(pattern, at, queries, keys), *own])
            made[place] = (o[:, place : place + 1].to(wide) + self.alpha * sums[key]).to(o.dtype)
        return with_heads(o, made)

    def keeping(self, kept: Collection[int]) -> ValuesAdded | None:
        left = tuple(h for h in self.heads if h in kept)
        return replace(self, heads=left) if left else None

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return without(known, self.heads)

    def __str__(self) -> str:
        return f"{self.alpha:g} times the values of {told(self.tokens)} added to {heads_told(self.heads)}"


def _of_keys(x: Tensor, at: Tensor) -> Tensor:
    """[..., T]: at the keys ``at``, of which ``x`` may tell all alike."""
    return x.expand(*x.shape[:3], at.shape[0]) if x.shape[3] == 1 else x.index_select(3, at)


def _seen(pattern: Pattern, at: Tensor, queries: int, keys: int) -> Tensor | None:
    """Bool [L, T]: which queries see the keys ``at``; None if the pattern hides nothing."""
    if isinstance(pattern, Full):
        return None
    i = torch.arange(queries, device=at.device) + (keys - queries)
    return pattern.at_length(keys).visible_pairs(i.unsqueeze(1), at.unsqueeze(0))


def _sum(v_B1TD: Tensor, shown: Sequence[Tensor | None]) -> Tensor:
    """[B, 1, L or 1, Dv]: the sum over the tokens that every one of ``shown`` (broadcast to [B, 1, L, T]) shows."""
    given = [s for s in shown if s is not None]
    if not given:
        return v_B1TD.sum(2, keepdim=True)
    weights = reduce(Tensor.__and__, given).to(v_B1TD.dtype)
    return (weights if weights.dim() > 1 else weights.unsqueeze(0)) @ v_B1TD


def without_shifts(edits: Sequence[HeadEdit]) -> tuple[tuple[HeadEdit, ...], dict[int, Tensor]]:
    """``edits`` without those that add the same to every token, and what these add to the result: [Dv] in float64 by head.

    Those before an edit that may do anything with them stay.
    """
    left: list[HeadEdit] = []
    added: dict[int, Tensor] = {}
    for n, edit in enumerate(edits):
        match edit:
            case Shifted() if (of_head := edit.of_head) is not None:
                added = {h: added.get(h, 0.0) + by for h, by in of_head.items()} | without(added, edit.heads)
                continue
            case Scaled(gains):
                added = {h: by * dict(gains).get(h, 1.0) for h, by in added.items()}
                if left and isinstance(left[-1], Scaled):
                    left[-1] = left[-1].times(edit)
                    continue
            case TowardValues(amounts):
                added = {h: by * (1.0 - dict(amounts).get(h, 0.0)) for h, by in added.items()}
            case Mixed(heads, gates, tokens=None):
                added = {h: by * (1.0 - dict(zip(heads, gates, strict=True)).get(h, 0.0)) for h, by in added.items()}
            case Replaced():
                added = without(added, edit.heads)
            case Shifted() | ValuesAdded():
                pass
            case _:
                left, added = list(edits[:n]), {}
        left.append(edit)
    return tuple(left), added
