"""Semantics of the parts of a spec: visible keys, the K/V head of each head, and edits.

All of it traces to plain operators, with no constant lifted into the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from torch import Tensor

from attnopt.base.bit_table import indices
from attnopt.base.sizes import is_static
from attnopt.ir.attend import Attend, RoutedAttend
from attnopt.ir.blame import applied
from attnopt.ir.mixed_maps import mixed
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Full


def edited(
    spec: AttentionSpec,
    core: RoutedAttend | Attend,
    constants: Sequence[Tensor] | None = None,
    *,
    skips_rows: bool = False,
) -> Attend:
    """``core``, which computes ``spec.bare``, with its map and all of its edits.

    ``constants``: ``spec.constants`` as tensors, so a graph can store them; None: created at each call.
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
    ) -> Tensor:
        held = iter([c.tensor(q.device) for c in spec.constants] if constants is None else constants)
        own = [[next(held) for _ in edit.constants] for edit in spec.after]
        wanted = {}
        if skips_rows and spec.route is not None:
            wanted["wanted"] = spec.route.gates(spec, q, own[spec.after.index(spec.route)])
        o: Tensor = core(q, k, v, bias=bias, mask=mask, sinks=sinks, **wanted)
        if spec.has_map:
            assert added is not None
            o = mixed(spec, o, v, keep, added)
        for edit, numbers in zip(spec.after, own, strict=True):
            o = applied(edit, spec, o, q, v, numbers, mask=mask, bias=bias)
        return o

    return attend


def require_no_edits(spec: AttentionSpec, *, pools: bool = False) -> None:
    """Raises ValueError: a backend computes a spec without its map and edits and, unless it ``pools``, without pooled keys."""
    if spec.after or spec.has_map or (spec.pooling is not None and not pools):
        what = "edits" if spec.after else "map" if spec.has_map else "pooled keys"
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


def selected(spec: AttentionSpec, q: Tensor, k: Tensor) -> Tensor:
    """Bool [B, H, block rows, block columns]: the blocks of keys that ``spec.selection`` keeps."""
    assert spec.selection is not None
    return spec.selection.select(q, heads_of(spec, k), spec.scale, spec.is_causal)


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
