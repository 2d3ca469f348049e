"""Attention with pooled keys for any backend: heads that pool are computed apart, over their pools where that is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attnopt.ir.attend import Attend, RoutedAttend
from attnopt.ir.head_parts import in_order, of_heads, taken
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.algebra import FULL


@dataclass(frozen=True)
class Part:
    """Heads that are computed together: ``whole``, an attention of the heads at ``places`` of another one, and of the K/V heads
    at ``kv_places``.  Either all of its heads pool, or none.

    ``is_reduced``: each pool is one key; otherwise the mean of a pool takes the place of each of its keys, with a bias of
    minus the logarithm of their number if ``weighs``.
    """

    places: tuple[int, ...]
    kv_places: tuple[int, ...]
    whole: AttentionSpec
    is_reduced: bool = False
    weighs: bool = False

    @property
    def spec(self) -> AttentionSpec:
        """What is left to compute with the keys in their new form."""
        return replace(self.whole, pooling=None, has_bias=self.whole.has_bias or self.weighs)

    @property
    def pooling(self) -> PooledKeys | None:
        return self.whole.pooling

    @property
    def is_unreduced(self) -> bool:
        """Pooling saves nothing here."""
        return self.pooling is not None and not self.is_reduced

    def kv_len(self, kv_len: int) -> int:
        """The keys that it computes with, of ``kv_len``."""
        return self.pooling.pools(kv_len) if self.pooling is not None and self.is_reduced else kv_len


def parts_of(spec: AttentionSpec) -> tuple[Part, ...]:
    """``spec.bare``: the heads that pool nothing, those that see nothing but their pools, and those with a
    pattern, a bias, a mask or gains, which tell keys of one pool apart."""
    bare = spec.bare
    if bare.pooling is None:
        return (Part(tuple(range(bare.num_heads)), tuple(range(bare.num_kv_heads)), bare),)
    groups: dict[tuple[bool, bool], list[int]] = {}
    for place, head in enumerate(bare.heads):
        pools = head in bare.pooling.heads
        tells_apart = bare.has_bias or bare.has_mask or bare.weight_gains is not None
        is_reduced = pools and bare.pattern.for_head(place) == FULL and not tells_apart
        groups.setdefault((pools, is_reduced), []).append(place)
    return tuple(_part(bare, places, is_reduced) for (_, is_reduced), places in groups.items())


def _part(spec: AttentionSpec, places: Sequence[int], is_reduced: bool) -> Part:
    whole = spec.keeping(spec.heads[place] for place in places)
    kv_places = tuple(spec.kv_heads.index(g) for g in whole.kv_heads)
    pooling = whole.pooling
    # Equal weights cancel in the softmax, unless a sink takes its share.
    weighs = pooling is not None and not is_reduced and (pooling.prefix > 0 or spec.has_sinks)
    return Part(tuple(places), kv_places, whole, is_reduced, weighs)


def pooled(
    spec: AttentionSpec, lower: Callable[[AttentionSpec], Any], ready: Sequence[tuple[Tensor, Tensor]] = ()
) -> RoutedAttend:
    """``spec``, which has no edits, by way of ``lower``, which is given specs without pooling.

    ``ready``: the keys and values that each part computes with, in the place of those of all heads."""
    parts = parts_of(spec)
    cores = [lower(part.spec) for part in parts]

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        made = []
        for i, (part, core) in enumerate(zip(parts, cores, strict=True)):
            others = {"bias": bias, "mask": mask, "sinks": sinks}
            own = {role: of_heads(x, part.places) for role, x in others.items()}
            if wanted is not None:
                own["wanted"] = taken(wanted, part.places)
            q_ = taken(q, part.places)
            if ready:
                made.append(core(q_, *ready[i], **own))
                continue
            k_, v_ = taken(k, part.kv_places), taken(v, part.kv_places)
            made.append(_attended(part, core, q_, k_, v_, own))
        return in_order(made, [part.places for part in parts])

    return attend


def _attended(part: Part, core: Attend, q: Tensor, k: Tensor, v: Tensor, others: Mapping[str, Tensor | None]) -> Tensor:
    pooling = part.pooling
    if pooling is None:
        return core(q, k, v, **others)
    kv_len, k, v = k.shape[2], pooling.mean(k), pooling.mean(v)
    if part.is_reduced:
        return core(q, k, v, **others)
    bias = others["bias"]
    if part.weighs:
        weights = pooling.log_weights(kv_len, q.dtype, q.device)[None, None, None]
        bias = weights if bias is None else bias + weights
    return core(q, pooling.spread(k, kv_len), pooling.spread(v, kv_len), **{**others, "bias": bias})
