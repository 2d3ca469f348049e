"""torch's own fused attention, ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnopt.backends.by_segment import in_batches
from attnopt.backends.speed import GPU_RATE, dense_flops, of_cpu
from attnopt.ir.attend import Attend
from attnopt.ir.interfaces import Backend
from attnopt.ir.refusal import Refusal
from attnopt.ir.semantics import heads_of, of_masked_blocks, require_no_edits, visible
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal, Full, Segments
from attnopt.patterns.algebra import FULL


class Sdpa(Backend):
    """One 4-D SDPA call; a pattern becomes a dense mask, except full visibility and the square causal triangle.

    Segments of one size in a grid of tokens (axial attention) become sequences of the batch.
    SDPA itself returns zeros for a fully masked query (torch >= 2.11; tested).
    """

    name: ClassVar[str] = "sdpa"
    channels: ClassVar[bool] = True

    def check(self, spec: AttentionSpec) -> Refusal | None:
        if spec.softcap is not None:
            return Refusal("no-softcap", expected="scores without softcap", found=f"softcap {spec.softcap}")
        if spec.has_sinks:
            return Refusal("no-sinks", expected="a softmax over keys alone", found="sink logits beside them")
        if not spec.scale > 0:
            return Refusal("no-such-scale", expected="a scale above 0", found=f"{spec.scale}")
        return None

    def lower(self, spec: AttentionSpec) -> Attend:
        require_no_edits(spec)
        masked = self._masked(spec)
        segments = _in_grid(spec)
        if segments is None:
            return masked
        of_each, tokens = in_batches(segments, self._masked(replace(spec, pattern=FULL))), segments.lengths

        def attend(
            q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
        ) -> Tensor:
            assert tokens is not None
            is_whole = all(statically_known_true(x.shape[2] == tokens[0]) for x in (q, k))
            return (of_each if is_whole else masked)(q, k, v, bias=bias, mask=mask, sinks=sinks)

        return attend

    def _masked(self, spec: AttentionSpec) -> Attend:
        def attend(
            q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
        ) -> Tensor:
            is_shared = spec.is_evenly_shared and spec.num_kv_heads < spec.num_heads  # as ``enable_gqa`` requires
            keys, values = (k, v) if is_shared else (heads_of(spec, k), heads_of(spec, v))
            # SDPA aligns its causal triangle with the first key, a pattern with the last.
            is_plain = spec.pattern == Causal() and spec.selection is None and bias is None and mask is None
            is_causal = is_plain and statically_known_true(q.shape[2] == k.shape[2])
            attn_mask = None if is_causal else _as_mask(bias, visible(spec, q, k, mask), q.dtype)
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask, is_causal=is_causal, scale=spec.scale, enable_gqa=is_shared
            )

        return attend

    def cost(self, site: Site) -> float:
        spec, skips = site.spec, self.skips_in(site)
        flops = dense_flops(site) * (spec.pattern.density(site.q_len, site.kv_len) if skips else 1.0)
        if site.device != "cpu":
            return flops / GPU_RATE
        speed = of_cpu(site)
        rate = speed.dense if skips else speed.masked
        if not spec.has_mask and not spec.has_bias and spec.selection is None and not skips:
            is_triangle = spec.pattern == Causal() and site.q_len == site.kv_len
            rate = speed.dense if spec.pattern == Full() else speed.causal if is_triangle else speed.masked
        return speed.dense_call + flops / rate

    def skips_in(self, site: Site) -> bool:
        return site.q_len == site.kv_len and not site.is_dynamic and _in_grid(site.spec) is not None

    def notes(self, spec: AttentionSpec) -> tuple[str, ...]:
        return of_masked_blocks(self.name, spec)


def _in_grid(spec: AttentionSpec) -> Segments | None:
    """Segments that can be sequences of their own: nothing else tells their tokens apart."""
    pattern, others = spec.pattern, (spec.has_bias, spec.has_mask, spec.has_sinks, spec.selection)
    if not isinstance(pattern, Segments) or any(others) or pattern.inputs or pattern.grid is None:
        return None
    return pattern


def _as_mask(bias: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One mask for SDPA: bool if it only expresses visibility, otherwise additive in the dtype of the queries."""
    if bias is None:
        return seen
    bias = bias.to(dtype)
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)
