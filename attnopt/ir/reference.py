"""The specification as code: the formula of ``AttentionSpec``, line by line, for any spec; simple and slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.ir.attend import Attend, AttendWithLse
from attnopt.ir.extended_keys import MoreKeys
from attnopt.ir.extension import seen_more
from attnopt.ir.operands import OperandTensors, SegmentTensors
from attnopt.ir.row_attention import without_other_rows
from attnopt.ir.semantics import heads_of, require_no_edits, row_sinks, visible
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.weight_gains import WeightGains

Weights = Callable[..., Tensor]  # q, k and the other operands -> attention weights


def reference(spec: AttentionSpec) -> Attend:
    """Plain tensor operations; scores and softmax in float32 or wider, the output in v's dtype.  Raises ValueError if
    ``spec`` has edits: see ``semantics.edited``."""
    require_no_edits(spec, pools=True, zero_keys=True, rows=True, extends=True)

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        more: MoreKeys | None = None,
        segments: SegmentTensors | None = None,
        score_map: Tensor | None = None,
        weight_map: Tensor | None = None,
    ) -> Tensor:
        if more is not None:
            s, sinks = scores_of(spec, q, k, bias, mask, sinks)
            p, _, _ = softmax_of(torch.cat([s, _more_scores(spec, q, more)], -1), sinks)
            own, others = p[..., : k.shape[2]], p[..., k.shape[2] :]
            return (own @ _read(spec, v, p.dtype) + others @ heads_of(spec, more.v).to(p.dtype)).to(v.dtype)
        p = weights_of(spec, q, k, bias, mask, sinks, segments, score_map)
        p = p if weight_map is None else across_heads(weight_map, p)
        o = (p @ _read(spec, v, p.dtype)).to(v.dtype)
        return o if spec.rows is None else without_other_rows(spec, o, OperandTensors(q, k, v, bias, mask, sinks))

    return attend


def reference_weights(spec: AttentionSpec) -> Weights:
    """The attention weights of ``spec`` without its edits, [B, H, L, S] over the keys themselves: those of a head that pools
    are spread over its pools.  Scores and softmax in float32 or wider."""

    def weights(
        q: Tensor,
        k: Tensor,
        *,
        bias: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        keep: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        p = weights_of(spec, q, k, bias, mask, sinks)
        if spec.pooling is not None:
            eye = torch.eye(k.shape[2], dtype=p.dtype, device=p.device)
            p = p @ spec.pooling.applied(spec.heads, eye.expand(1, spec.num_heads, -1, -1))
        if not spec.has_map:
            return p
        assert added is not None
        return (p if keep is None else p * keep.to(p.dtype)) + added.to(p.dtype)

    return weights


def reference_with_lse(spec: AttentionSpec) -> AttendWithLse:
    """As ``reference``, for a spec without gains on its weights."""
    require_no_edits(spec, pools=True, zero_keys=True)
    assert spec.weight_gains is None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        p, top, log_sum = softmax_of(*scores_of(spec, q, k, bias, mask, sinks))
        return (p @ _read(spec, v, p.dtype)).to(v.dtype), top, log_sum

    return attend


def weights_of(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    segments: SegmentTensors | None = None,
    score_map: Tensor | None = None,
) -> Tensor:
    """The attention weights [B, H, L, S] after their gains, without a map; float32 or wider."""
    if spec.linear is not None:
        return spec.linear.of_scores(_products(spec, q, k), visible(spec, q, k, mask))
    s, sinks = scores_of(spec, q, k, bias, mask, sinks, score_map)
    if spec.sends:
        return softmax_of(s.mT, None)[0].mT
    p, top, _ = softmax_of(s, sinks)
    if spec.weight_gains is None:
        return p
    base = top.masked_fill(top == -torch.inf, 0.0).unsqueeze(-1)  # beside scores of -1e9, gains would be lost
    pieces = _pieces(spec, spec.weight_gains, p) if segments is None else [x.mask() for x in segments.parts]
    return _with_gains(spec.weight_gains, pieces, p, s - base, None if sinks is None else sinks - base)


def across_heads(map_1HJ1: Tensor, x_BJLS: Tensor) -> Tensor:
    """Scores or weights of heads, each in terms of all."""
    return torch.einsum("hj,bjls->bhls", map_1HJ1[0, :, :, 0].to(x_BJLS.dtype), x_BJLS)


def scores_of(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    score_map: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scores [B, H, L, S], -inf where hidden, and the sink logits; float32 or wider."""
    s = _products(spec, q, k)
    wide = s.dtype
    if spec.clamp is not None:
        s = s.clamp(*spec.clamp)
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if score_map is not None:
        s = across_heads(score_map, s)
    if bias is not None:
        s = s + bias.to(wide)
    if spec.pooling is not None:
        s = s + spec.pooling.log_weights_of(spec.heads, k.shape[2], wide, k.device)
    seen = visible(spec, q, k, mask)
    if seen is not None:
        s = s.masked_fill(~seen, -torch.inf)
    return s, row_sinks(spec, q, k, sinks)


def _products(spec: AttentionSpec, q: Tensor, k: Tensor) -> Tensor:
    """[B, H, L, S], float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return spec.scale * (q.to(wide) @ _read(spec, k, wide).mT)


def _more_scores(spec: AttentionSpec, q: Tensor, more: MoreKeys) -> Tensor:
    """The scores of other tokens [B, H, L, M], -inf where hidden."""
    assert spec.extension is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(wide) @ heads_of(spec, more.k).to(wide).mT) * spec.scale
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    s = s + spec.extension.log_weight
    seen = seen_more(spec, more, q)
    return s if seen is None else s.masked_fill(~seen, -torch.inf)


def _read(spec: AttentionSpec, x_BGSD: Tensor, dtype: torch.dtype) -> Tensor:
    """The keys or values that each head reads, [B, H, S, D]."""
    x_BHSD = heads_of(spec, x_BGSD).to(dtype)
    return x_BHSD if spec.pooling is None else spec.pooling.applied(spec.heads, x_BHSD)


def _pieces(spec: AttentionSpec, gains: WeightGains, p: Tensor) -> list[Tensor]:
    """Bool [1, H|1, L, S]"""
    return [x.mask(*p.shape[2:], num_heads=spec.num_heads, device=p.device).unsqueeze(0) for x in gains.pieces]


def _with_gains(gains: WeightGains, pieces: Sequence[Tensor], p: Tensor, s: Tensor, sinks: Tensor | None) -> Tensor:
    """The weights p = softmax(s) after their gains; ``pieces``: bool, disjoint, broadcasting to [B, H, L, S]."""
    masses = [p.masked_fill(~piece, 0.0).sum(-1) for piece in pieces]
    rows, factor = gains.of_rows(masses), torch.ones_like(p)
    for piece, gain in zip(pieces, rows.gains, strict=True):
        factor = torch.where(piece, gain.unsqueeze(-1), factor)
    if gains.normalise == "logits":
        return softmax_of(s + factor.log(), sinks)[0]
    if rows.moved is None:
        return p * factor
    of_receivers = p.masked_fill(~pieces[-2], 0.0) / masses[-2].masked_fill(masses[-2] == 0, 1.0).unsqueeze(-1)
    return p * factor + rows.moved.unsqueeze(-1) * of_receivers


def softmax_of(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the last axis and the sink logit, and the log-sum-exp of each row as in ``AttendWithLse``; a row of only
    -inf becomes zeros."""
    top = s.detach().amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    base = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(s - base)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - base)
    total = total.masked_fill(total == 0.0, 1.0)
    return p / total, top.squeeze(-1).expand(s.shape[:-1]), total.log().squeeze(-1)
