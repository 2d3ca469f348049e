"""Semantics of the parts of a spec: visible keys, the K/V head of each head, and edits.

All of it traces to plain operators, with no constant lifted into the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attnopt.base.bit_table import indices
from attnopt.base.sizes import is_static
from attnopt.ir.attend import Attend, RoutedAttend
from attnopt.ir.blame import applied
from attnopt.ir.call_segments import CallSegments
from attnopt.ir.call_tensor import known
from attnopt.ir.mixed_maps import mixed
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Full


def edited(
    spec: AttentionSpec,
    core: RoutedAttend | Attend,
    tensors: Sequence[Tensor] | None = None,
    *,
    skips_rows: bool = False,
) -> Attend:
    """``core``, which computes ``spec.bare``, with its map, all of its edits and what comes from another run.

    ``tensors``: those of ``before`` and of the edits; None: the constants, created at each call, where no call brings any.
    ``skips_rows``: ``core`` is a ``RoutedAttend``.
    """

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        keep: Tensor | None = None,
        added: Tensor | None = None,
        **maps: Tensor,
    ) -> Tensor:
        sources = spec.tensors[len(spec.of_selection) + len(spec.of_segments) :]
        held = iter(known(sources, q.device) if tensors is None else tensors)
        moved = transplanted(spec, q, k, v, [next(held) for _ in spec.before])
        own = [[next(held) for _ in edit.tensors] for edit in spec.after]
        wanted = dict(maps)
        if skips_rows and spec.route is not None:
            wanted["wanted"] = spec.route.gates(spec, q, own[spec.after.index(spec.route)])
        o: Tensor = core(*moved, bias=bias, mask=mask, sinks=sinks, **wanted)
        if spec.has_map:
            assert added is not None
            o = mixed(spec, o, v, keep, added)
        for edit, numbers in zip(spec.after, own, strict=True):
            o = applied(edit, spec, o, q, k, v, numbers, mask=mask, bias=bias)
        return o

    return attend


def transplanted(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, values: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of ``spec.bare``.  ``values``: those of ``spec.before``."""
    if spec.has_own_keys:
        k, v = heads_of(spec, k), heads_of(spec, v)
    for moved, given in zip(spec.before, values, strict=True):
        if moved.role == "q":
            q = moved.apply(spec.heads, q, given, k.shape[2])
        else:
            k = moved.apply(spec.heads, k, given, k.shape[2])
    return q, k, v


def in_segments(segments: CallSegments, tensors: Sequence[Tensor], core: Any) -> RoutedAttend:
    """``core``, which takes ``segments``, with those of this call, or with the parts of its gains."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **others: Tensor | None) -> Tensor:
        o: Tensor = core(q, k, v, **others, segments=segments.used(tensors, q.shape[2]))
        return o

    return attend


def masked_by(segments: CallSegments, tensors: Sequence[Tensor], core: Attend) -> Attend:
    """``core`` with the segments of this call as its mask, joined with another one."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, **others: Any) -> Tensor:
        seen = segments.used(tensors, q.shape[2]).mask()
        return core(q, k, v, mask=seen if mask is None else seen & mask, **others)

    return attend


def require_no_edits(
    spec: AttentionSpec, *, pools: bool = False, zero_keys: bool = False, rows: bool = False, extends: bool = False
) -> None:
    """Raises ValueError: a backend computes a spec without its map, edits and transplants and, unless it ``pools``, knows
    ``zero_keys`` or ``rows``, or ``extends``, without these."""
    has = {
        "transplants": bool(spec.before),
        "edits": bool(spec.after),
        "map": spec.has_map,
        "pooled keys": spec.pooling is not None and not pools,
        "zero keys": spec.zero_keys is not None and not zero_keys,
        "chosen rows": spec.rows is not None and not rows,
        "keys of other tokens": spec.extension is not None and not extends,
    }
    if (what := next((name for name, there in has.items() if there), None)) is not None:
        raise ValueError(f"lower the spec without its {what}, or with attnopt.ir.plugin_calls.attention_of")


def visible(spec: AttentionSpec, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """Bool [B|1, H|1, L|1, S]: the mask operand, the pattern and the selected blocks combined; None if every query sees
    every key."""
    q_len, kv_len = q.shape[2], k.shape[2]
    seen = [] if mask is None else [mask]
    if not _sees_all(spec, q_len, kv_len):
        seen.append(spec.pattern.mask(q_len, kv_len, num_heads=spec.num_heads, device=q.device).unsqueeze(0))
    if spec.selection is not None:
        seen.append(spec.selection.spread(selected(spec, q, k), q_len, kv_len))
    return reduce(Tensor.__and__, seen) if seen else None


def row_sinks(spec: AttentionSpec, q: Tensor, k: Tensor, sinks: Tensor | None) -> Tensor | None:
    """The sinks and zero keys of each query as one logit, [1, H|1, L|1, 1], float32 or wider; None if there are none."""
    wide = torch.promote_types(q.dtype, torch.float32)
    sinks = None if sinks is None else sinks.to(wide)
    if spec.zero_keys is None:
        return sinks
    zeros = spec.zero_keys.logits(q.shape[2], k.shape[2], spec.num_heads, q.new_empty(0, dtype=wide))
    return zeros if sinks is None else torch.logaddexp(sinks, zeros)


def selected(spec: AttentionSpec, q: Tensor, k: Tensor) -> Tensor:
    """Bool [B, H, block rows, block columns]: the blocks of keys that ``spec.selection`` keeps."""
    assert spec.selection is not None
    return spec.selection.select(q, heads_of(spec, k), spec.scale, spec.is_causal, spec.heads)


def of_masked_blocks(backend: str, spec: AttentionSpec) -> tuple[str, ...]:
    """The note of a masking backend about blocks selected at run time."""
    if spec.selection is None:
        return ()
    return (f"{backend}: blocks that are not kept are masked, not skipped: no time is saved",)


def heads_of(spec: AttentionSpec, kv: Tensor) -> Tensor:
    """Keys or values [B, G, S, D] as [B, H, S, D]: the one that each query head reads."""
    if spec.kv_of_head == tuple(range(spec.num_kv_heads)):
        return kv
    return kv.index_select(1, indices(spec.kv_of_head, kv.device))


def _sees_all(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    """Whether the pattern hides nothing.  Never decided on a symbolic length, which would add a guard."""
    if spec.pattern == Full():
        return True
    if not (is_static(q_len) and is_static(kv_len)):
        return False
    return spec.pattern.covers(int(q_len), int(kv_len), num_heads=spec.num_heads)
