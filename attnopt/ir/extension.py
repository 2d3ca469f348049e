"""Attention over a site's own keys and those of other tokens: joined before it, or two attentions merged after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.base.bit_table import stretched
from attnopt.base.sizes import is_static
from attnopt.ir.attend import AttendWithLse
from attnopt.ir.extended_keys import ExtendedKeys, MoreKeys
from attnopt.ir.head_parts import in_order, taken
from attnopt.ir.lse_merge import shares
from attnopt.ir.semantics import visible
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.algebra import FULL


def joins_simply(spec: AttentionSpec) -> bool:
    """Whether own and other keys side by side need no more than one number for each key: no mask for each query."""
    ext = _extension(spec)
    hides = spec.pattern != FULL or spec.has_mask or spec.has_bias or spec.selection is not None
    return not hides and set(ext.heads) == set(spec.heads)


def joined_spec(spec: AttentionSpec) -> AttentionSpec:
    """The attention over keys of both kinds side by side; what hides own keys from queries is a mask operand."""
    ext = _extension(spec)
    return replace(
        spec,
        extension=None,
        pattern=FULL,
        seen_as=None,
        selection=None,
        has_mask=not _shows_all(spec),
        has_bias=spec.has_bias or ext.weight != 1.0,
    )


def joined(spec: AttentionSpec, core: Any) -> Any:
    """``spec`` by way of ``core``, which computes ``joined_spec(spec)``."""
    ext = _extension(spec)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, more: MoreKeys, **others: Any
    ) -> Tensor:
        S, M = k.shape[2], more.k.shape[2]
        if not _shows_all(spec):
            own = visible(spec, q, k, mask)
            mask = _beside(own, _seen(spec, more, q), S, M, torch.ones((), dtype=torch.bool, device=q.device))
        if bias is not None or ext.weight != 1.0:
            weight = q.new_full((1, 1, 1, 1), ext.log_weight)
            bias = _beside(bias, weight if bias is None else weight.to(bias.dtype), S, M, weight.new_zeros(()))
        every = more.of_batch(k.shape[0])
        o: Tensor = core(q, torch.cat([k, every.k], 2), torch.cat([v, every.v], 2), bias=bias, mask=mask, **others)
        return o

    return attend


def merged(spec: AttentionSpec, core_of: Callable[[AttentionSpec], AttendWithLse]) -> Any:
    """``spec`` as two attentions, over keys of either kind, merged by their log-sum-exps: there is no map of weights."""
    ext = _extension(spec)
    own = core_of(replace(spec, extension=None, has_sinks=False))
    reading = spec.keeping(ext.heads)
    of_heads = [i for i, h in enumerate(spec.heads) if h in ext.heads]
    apart = [i for i in range(spec.num_heads) if i not in of_heads]
    kv_places = [spec.kv_heads.index(g) for g in reading.kv_heads]
    of_more = replace(
        reading,
        extension=None,
        pattern=FULL,
        seen_as=None,
        selection=None,
        has_bias=False,
        has_sinks=False,
        has_mask=ext.mask is not None,
    )
    beside = core_of(of_more)

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        more: MoreKeys,
    ) -> Tensor:
        o, top, log = own(q, k, v, bias=bias, mask=mask, sinks=None)
        every = more.of_batch(k.shape[0])
        seen = None if more.seen is None else more.seen[:, None, None, :]
        found = beside(
            taken(q, of_heads), taken(every.k, kv_places), taken(every.v, kv_places), bias=None, mask=seen, sinks=None
        )
        o_more, top_more, log_more = found[0], found[1], found[2] + ext.log_weight
        if apart:
            none = taken(top, apart)
            both = (of_heads, apart)
            o_more = in_order([o_more, torch.zeros_like(taken(o, apart))], both)
            top_more = in_order([top_more, torch.full_like(none, -torch.inf)], both)
            log_more = in_order([log_more, torch.zeros_like(none)], both)
        sink = None if sinks is None else sinks.to(log.dtype).squeeze(-1).expand_as(log)
        of_own, of_others = shares([top, top_more], [log, log_more], sink)
        return (of_own.unsqueeze(-1) * o + of_others.unsqueeze(-1) * o_more).to(v.dtype)

    return attend


def seen_more(spec: AttentionSpec, more: MoreKeys, q: Tensor) -> Tensor | None:
    """Bool [B|1, H|1, 1, M|1]: which heads see which of the other keys; None if all see all."""
    return None if _all_see_all(spec) else _seen(spec, more, q)


def _extension(spec: AttentionSpec) -> ExtendedKeys:
    assert spec.extension is not None
    return spec.extension


def _all_see_all(spec: AttentionSpec) -> bool:
    ext = _extension(spec)
    return ext.mask is None and set(ext.heads) == set(spec.heads)


def _shows_all(spec: AttentionSpec) -> bool:
    return _all_see_all(spec) and spec.pattern == FULL and not spec.has_mask and spec.selection is None


def _seen(spec: AttentionSpec, more: MoreKeys, q: Tensor) -> Tensor:
    ext = _extension(spec)
    seen = q.new_ones((1, 1, 1, 1), dtype=torch.bool) if more.seen is None else more.seen[:, None, None, :]
    if set(ext.heads) == set(spec.heads):
        return seen
    reads = stretched(((int(h in ext.heads), 1) for h in spec.heads), q.device) == 1
    return seen & reads[None, :, None, None]


def _beside(own: Tensor | None, more: Tensor, kv_len: Any, count: Any, nothing: Tensor) -> Tensor:
    """An operand of own keys [B|1, H|1, L|1, S|1], or ``nothing`` for each of them, and one of other keys, side by side."""
    own = nothing.reshape(1, 1, 1, 1) if own is None else own.reshape((1,) * (4 - own.dim()) + tuple(own.shape))
    lead = [b if is_static(a) and a == 1 else a for a, b in zip(own.shape[:3], more.shape[:3], strict=True)]
    return torch.cat([own.expand(*lead, kv_len), more.expand(*lead, count)], 3)
