"""Attention of chosen rows for any backend: their queries are gathered, computed, and put back among zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.errors import PluginError
from attnopt.ir.attend import Attend
from attnopt.ir.head_parts import in_order, of_heads, taken
from attnopt.ir.operands import OperandTensors
from attnopt.ir.query_rows import Choice, ChosenRows
from attnopt.ir.received_weights import received_weights
from attnopt.ir.semantics import heads_of
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.algebra import FULL, Pattern

_HIDES = 100.0  # a key whose bias is so far below another one's has no weight in single precision


@dataclass(frozen=True)
class RowPart:
    """Heads that are computed together: ``whole``, an attention of the heads at ``places`` of another one, and of the K/V heads
    at ``kv_places``.  Either all of its heads choose rows, or none."""

    places: tuple[int, ...]
    kv_places: tuple[int, ...]
    whole: AttentionSpec

    @property
    def rows(self) -> ChosenRows | None:
        return self.whole.rows

    @property
    def spec(self) -> AttentionSpec:
        """What is left to compute, of chosen rows with the pattern as a mask."""
        if self.rows is None:
            return self.whole
        hides = self.whole.has_mask or self.whole.pattern != FULL
        return replace(self.whole, rows=None, pattern=FULL, seen_as=None, has_mask=hides)

    def q_len(self, q_len: int) -> int:
        """The queries that it computes, of ``q_len``."""
        return q_len if self.rows is None else self.rows.count(q_len)

    def of(self, t: OperandTensors) -> OperandTensors:
        """The operands of its heads, those beside q, k and v with four axes."""
        bias, mask, sinks = (
            None if x is None else of_heads(_with_four_axes(x), self.places) for x in (t.bias, t.mask, t.sinks)
        )
        q, k, v = taken(t.q, self.places), taken(t.k, self.kv_places), taken(t.v, self.kv_places)
        return OperandTensors(q, k, v, bias, mask, sinks)


def row_parts(spec: AttentionSpec) -> tuple[RowPart, ...]:
    """``spec.bare``: the heads that choose rows, and those that do not."""
    bare = spec.bare
    if bare.rows is None:
        return (RowPart(tuple(range(bare.num_heads)), tuple(range(bare.num_kv_heads)), bare),)
    groups: dict[bool, list[int]] = {}
    for place, head in enumerate(bare.heads):
        groups.setdefault(head in bare.rows.heads, []).append(place)
    return tuple(_part(bare, places) for places in groups.values())


def _part(spec: AttentionSpec, places: Sequence[int]) -> RowPart:
    whole = spec.keeping(spec.heads[place] for place in places)
    return RowPart(tuple(places), tuple(map(spec.kv_heads.index, whole.kv_heads)), whole)


def on_chosen_rows(spec: AttentionSpec, lower: Callable[[AttentionSpec], Attend]) -> Attend:
    """``spec``, which has no edits, by way of ``lower``, which is given specs that compute all of their rows."""
    parts = row_parts(spec)
    cores = [lower(part.spec) for part in parts]

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        whole = OperandTensors(q, k, v, bias, mask, sinks)
        made = [_attended(part, core, part.of(whole)) for part, core in zip(parts, cores, strict=True)]
        return in_order(made, [part.places for part in parts])

    return attend


def without_other_rows(spec: AttentionSpec, o: Tensor, t: OperandTensors) -> Tensor:
    """The output ``o`` of all rows with zeros in those that ``spec`` does not choose."""
    parts = row_parts(spec)
    made = [taken(o, part.places) for part in parts]
    for n, part in enumerate(parts):
        if part.rows is not None:
            made[n] = made[n].masked_fill(~chosen(part.whole, part.of(t)).chosen.unsqueeze(-1), 0.0)
    return in_order(made, [part.places for part in parts])


def chosen(spec: AttentionSpec, t: OperandTensors) -> Choice:
    """The rows that ``spec``, whose heads all choose, computes for these operands."""
    rows = spec.rows
    assert rows is not None
    real = _real(spec, rows, t)
    scores = rows.scores.score(
        t.q, heads_of(spec, t.k), real_BL=real, received=lambda stride: _received(spec, t, real, stride)
    )
    return rows.choose(_checked(rows, scores, t.q), real)


def _attended(part: RowPart, core: Attend, t: OperandTensors) -> Tensor:
    if part.rows is None:
        return core(t.q, t.k, t.v, bias=t.bias, mask=t.mask, sinks=t.sinks)
    choice = chosen(part.whole, t)
    bias, mask, sinks = (None if x is None else choice.rows_of(x) for x in (t.bias, t.mask, t.sinks))
    if part.whole.pattern != FULL:
        mask = _both(mask, _pattern_rows(part.whole, choice.index, t))
    return choice.spread(core(choice.rows_of(t.q), t.k, t.v, bias=bias, mask=mask, sinks=sinks))


def _received(spec: AttentionSpec, t: OperandTensors, real: Tensor | None, stride: int) -> Tensor:
    """[B, S]: the weight that each key receives from every ``stride``-th real query, relative to the mean of all real keys."""
    q, senders = t.q[:, :, ::stride], None
    if real is not None:  # gathered, because torch.export would fix the divisibility of what a slice with steps leaves
        senders = real.index_select(1, torch.arange(0, real.shape[1], stride, device=real.device))
    bias, mask, sinks = (x if x is None or x.shape[2] == 1 else x[:, :, ::stride] for x in (t.bias, t.mask, t.sinks))
    if spec.pattern != FULL:
        place = torch.arange(q.shape[2], device=q.device) * stride
        mask = _both(mask, _pattern_rows(spec, place[None, None], t))
    by_head = received_weights(q, t.k, bias, mask, sinks, senders, spec.kv_of_head, spec.scale, spec.softcap)
    weight: Tensor = by_head.sum(1)
    count = torch.ones_like(weight) if real is None else real.to(weight.dtype)
    return weight * count.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def _real(spec: AttentionSpec, rows: ChosenRows, t: OperandTensors) -> Tensor | None:
    """Bool [B|1, L]: the tokens that are no padding, as far as a mask tells.  Of tokens that are also keys, those that some query
    sees; in cross-attention, queries that see some key."""
    bias = t.bias if rows.bias_hides else None
    seen = t.mask
    if bias is not None:
        wide = bias.float() if seen is None else bias.float().masked_fill(~seen, -torch.inf)
        top = wide.amax(-1, keepdim=True)
        seen = wide - top.clamp(min=torch.finfo(torch.float32).min) > -_HIDES
    if seen is None:
        return None
    if spec.is_cross:
        by_query = seen.any(3).any(1)
        return by_query.expand(-1, t.q.shape[2])
    return seen.flatten(1, 2).any(1).expand(-1, t.k.shape[2])


def _pattern_rows(spec: AttentionSpec, places_BHR: Tensor, t: OperandTensors) -> Tensor:
    """Bool [B|1, H|1, R, S]: what the queries at these places see."""
    L, S = t.q.shape[2], t.k.shape[2]
    b, h = places_BHR.shape[:2]
    i = places_BHR.flatten(0, 1).unsqueeze(2) + (S - L)
    j = torch.arange(S, device=i.device)[None, None].expand(i.shape[0], 1, -1)

    def of(pattern: Pattern) -> Tensor:
        return pattern.at_length(S).visible_pairs(i, j).reshape(b, h, -1, S)

    if not spec.pattern.is_per_head:
        return of(spec.pattern)
    own = [spec.pattern.for_head(head) for head in range(spec.num_heads)]
    known = {pattern: of(pattern) for pattern in dict.fromkeys(own)}
    return torch.cat([known[p] if h == 1 else known[p][:, n : n + 1] for n, p in enumerate(own)], 1)


def _checked(rows: ChosenRows, scores: object, q: Tensor) -> Tensor:
    """Raises PluginError without the site."""
    B, H, L, _ = q.shape
    expected = f"a floating-point tensor [{_told(B)}, {_told(L)}] or [{_told(B)}, {H}, {_told(L)}]"
    got = type(scores).__name__
    if isinstance(scores, Tensor):
        got = f"{str(scores.dtype).removeprefix('torch.')} [{', '.join(map(_told, scores.shape))}]"
        sizes = [tuple(map(_told, shape)) for shape in ((B, L), (B, H, L))]
        if scores.is_floating_point() and tuple(map(_told, scores.shape)) in sizes:
            return scores.to(torch.promote_types(scores.dtype, torch.float32))
    raise PluginError(f"row score {rows.scores} gave {got}, expected {expected}", hint="fix the row score")


def _told(size: int | torch.SymInt) -> str:
    return str(size)


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


def _with_four_axes(x: Tensor) -> Tensor:
    return x.reshape(*[1] * (4 - x.dim()), *x.shape)
