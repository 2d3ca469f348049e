"""The attention function of transformers models with patterns or evicted keys, for their AttentionInterface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnopt.backends.blocked import Blocked
from attnopt.backends.reference import Reference
from attnopt.backends.sdpa import Sdpa
from attnopt.base.intervals import clipped
from attnopt.conversion.eviction_votes import ROWS, are_tokens, held_mask, votes_of
from attnopt.conversion.head_groups import HeadGroup, head_groups
from attnopt.conversion.hf_cache_hook import PATTERN
from attnopt.conversion.hf_cached_keys import source_of
from attnopt.conversion.hf_evicting_layer import EvictingLayer
from attnopt.conversion.hf_groups_layer import HeadGroupsLayer
from attnopt.errors import ConversionError
from attnopt.ir.interfaces import Backend
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal
from attnopt.patterns.algebra import Full, Pattern
from attnopt.patterns.lookback import Past, widest


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The function that transformers calls: q [B, H, L, D], k and v [B, G, S, D] -> [B, L, H, Dv].

    The last query is aligned with the last key.  Keys that a ``RollingLayer`` dropped are missing after the sinks; the
    mask skips them here.
    """
    pattern: Pattern = getattr(module, PATTERN, Full())
    if pattern.is_per_head:
        _require_all_heads(module, query.shape[1])
    options = _Options(dropout, scaling, is_causal, softcap, s_aux, position_bias, kwargs)
    source = source_of(key)
    if source is not None and isinstance(source.layer, HeadGroupsLayer):
        groups = head_groups(pattern, query.shape[1], key.shape[1])
        parts = source.parts or source.layer.split(key, value, groups)
        return _by_groups(module, query, groups, parts, attention_mask, pattern, options), None
    if source is not None and isinstance(source.layer, EvictingLayer):
        return _evicting(module, query, key, value, source.layer, attention_mask, pattern, options), None
    past = widest(pattern.for_head(h).look_back for h in range(pattern.named_heads + 1))  # as the cache layer counts it
    return _attended(module, query, key, value, attention_mask, pattern, past, options), None


def _require_all_heads(module: nn.Module, heads: int) -> None:
    """ConversionError where tensor parallelism left this process some of the heads: which ones, nothing here says."""
    known = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if isinstance(known, int) and heads < known:
        raise ConversionError(
            f"the pattern differs by head, and this process has {heads} of {known} heads",
            hint="give all heads one pattern, or split the result of attnopt.optimize by attnopt.distributed.tensor_parallel",
        )


@dataclass(frozen=True)
class _Options:
    """What transformers passes besides queries, keys, values and mask."""

    dropout: float
    scaling: float | None
    is_causal: bool | None
    softcap: float | None
    s_aux: Tensor | None  # sink logits [H]
    position_bias: Tensor | None  # [1 or B, H, L, S]
    others: Mapping[str, object]

    def for_heads(self, heads: Sequence[int]) -> _Options:
        s_aux = None if self.s_aux is None else self.s_aux.flatten()[list(heads)]
        return replace(self, s_aux=s_aux, position_bias=_of_heads(self.position_bias, heads))


def _by_groups(
    module: nn.Module,
    query: Tensor,
    groups: Sequence[HeadGroup],
    parts: Sequence[tuple[Tensor, Tensor]],
    mask: Tensor | None,
    pattern: Pattern,
    options: _Options,
) -> Tensor:
    """Heads that are stored apart, each group over its own keys and values."""
    made = [
        _attended(
            module, query[:, list(g.heads)], k, v, _of_heads(mask, g.heads), pattern.for_heads(g.heads), g.past,
            options.for_heads(g.heads),
        )
        for g, (k, v) in zip(groups, parts, strict=True)
    ]  # fmt: skip
    order = [h for g in groups for h in g.heads]
    return torch.cat(made, dim=2)[:, :, [order.index(h) for h in range(len(order))]]


def _evicting(
    module: nn.Module,
    query: Tensor,
    held: Tensor,
    value: Tensor,
    layer: EvictingLayer,
    mask: Tensor | None,
    pattern: Pattern,
    options: _Options,
) -> Tensor:
    """Over what an evicting layer holds, which then drops what received the least."""
    if options.position_bias is not None:
        raise ConversionError(
            "a bias by position is not supported where keys are evicted", hint="exclude the layer from evict-keys"
        )
    assert layer.positions is not None, "it has just returned keys"
    heads, positions = query.shape[1], layer.positions
    new, total = query.shape[2], layer.get_seq_length()
    causal = Causal() & pattern

    def shown(start: int, stop: int) -> Tensor:
        """For these of the new queries."""
        rows = None if mask is None else mask[:, :, start:stop]
        return held_mask(rows, causal, heads, range(total - new + start, total - new + stop), total, positions)

    if layer.is_whole:
        out = _attended(module, query, held, value, mask, pattern, None, options)
    else:
        out = _attended(module, query, held, value, shown(0, new), Full(), None, replace(options, is_causal=False))
    scale = query.shape[3] ** -0.5 if options.scaling is None else options.scaling
    votes = torch.zeros(positions.shape, dtype=torch.promote_types(held.dtype, torch.float32), device=held.device)
    with torch.no_grad():
        for start in range(new - layer.voters(new), new, ROWS):
            stop = min(start + ROWS, new)
            counted = None if mask is None else are_tokens(mask[:, :, start:stop], total - new + start)
            votes += votes_of(
                query[:, :, start:stop], held, shown(start, stop), scale, options.softcap, options.s_aux, counted
            )
    layer.evict(votes, new)
    return out


def _of_heads(scores: Tensor | None, heads: Sequence[int]) -> Tensor | None:
    """What belongs to these heads of [B, H or 1, L, S]."""
    return scores if scores is None or scores.shape[1] == 1 else scores[:, list(heads)]


def _attended(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    pattern: Pattern,
    past: Past | None,
    options: _Options,
) -> Tensor:
    """``past``: what the keys are left of, if the cache dropped some."""
    own_scores = options.softcap is not None or options.s_aux is not None
    if isinstance(pattern, Full) and not own_scores:
        return _plain(module, query, key, value, mask, options.is_causal, options)
    mask, bias = (None if t is None else _left(t, key.shape[2], past) for t in (mask, options.position_bias))
    options = replace(options, position_bias=bias)
    is_causal = getattr(module, "is_causal", True) if options.is_causal is None else options.is_causal
    if mask is None and is_causal:
        pattern = Causal() & pattern  # the meaning of a missing mask in transformers
    if options.dropout == 0.0 and (query.shape[2] > 1 or own_scores):
        return _computed(query, key, value, mask, pattern, options)
    if own_scores:
        raise ConversionError(
            "softcap and sink logits are not supported with dropout", hint="set attention_dropout to 0"
        )
    return _plain(module, query, key, value, _with_pattern(mask, pattern, query, key), False, options)


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    options: _Options,
) -> Tensor:
    """By transformers' own function."""
    out: Tensor
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, options.dropout, options.scaling, is_causal, options.position_bias,
        **options.others,
    )  # fmt: skip
    return out


def _left(mask: Tensor, kv_len: int, past: Past | None) -> Tensor:
    """The columns of ``mask`` [.., all tokens] whose keys are left."""
    if mask.shape[-1] == kv_len:
        return mask
    if past is None or mask.shape[-1] < kv_len:
        raise ConversionError(
            f"the mask has {mask.shape[-1]} keys, but the cache returned {kv_len}",
            hint="generate with the default cache, or apply the window to all sliding layers",
        )
    return torch.cat([mask[..., : past.sinks], mask[..., mask.shape[-1] - kv_len + past.sinks :]], dim=-1)


def _with_pattern(mask: Tensor | None, pattern: Pattern, q: Tensor, k: Tensor) -> Tensor | None:
    """Mask and pattern as one dense mask; None if everything is visible."""
    L, S = q.shape[2], k.shape[2]
    if not pattern.is_per_head and clipped(pattern.reach(S - L, S - 1, S).all, S) == ((0, S),):
        return mask
    seen = pattern.mask(L, S, num_heads=q.shape[1], device=q.device).unsqueeze(0)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def _computed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, options: _Options) -> Tensor:
    is_bool = mask is not None and mask.dtype == torch.bool
    own = options.position_bias
    bias = own if mask is None or is_bool else mask if own is None else mask + own
    scale = q.shape[3] ** -0.5 if options.scaling is None else options.scaling
    spec = AttentionSpec.of(
        q.shape[1], k.shape[1], q.shape[3], v.shape[3], scale=scale, pattern=pattern, softcap=options.softcap
    ).having(bias, mask if is_bool else None, options.s_aux)
    sinks = None if options.s_aux is None else options.s_aux.view(1, -1, 1, 1)
    backend: Backend = Blocked()
    if torch.compiler.is_exporting():  # as operators that `convert` can read again
        backend = Sdpa() if Sdpa().check(spec) is None else Reference()
    o = backend.lower(spec)(q, k, v, bias=bias, mask=mask if is_bool else None, sinks=sinks)
    return o.transpose(1, 2).contiguous()
