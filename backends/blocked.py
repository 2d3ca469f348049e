"""Attention that computes only the blocks its pattern keeps: time and memory grow with these, not quadratically."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from attnopt.backends import native
from attnopt.backends.attention_operator import attention
from attnopt.backends.speed import GPU_RATE, dense_flops, of_cpu
from attnopt.ir.attend import RoutedAttend
from attnopt.ir.interfaces import Backend
from attnopt.ir.operands import BLOCK
from attnopt.ir.refusal import Refusal
from attnopt.ir.semantics import require_no_edits, selected
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.registry import is_readable
from attnopt.patterns.tile_cost import COMPILED, FLEX

_FLEX_RATE = 0.7  # of SDPA's, for the pairs that it computes


@dataclass(frozen=True)
class Blocked(Backend):
    """One ``attnopt::attention`` call: a compiled CPU kernel, FlexAttention, or torch operators block by block.

    Accepts every spec whose selection has whole blocks, with static or dynamic lengths; its block layout is computed
    once the lengths are known, and cached.  ``skips_rows``: if tokens are routed to heads, only the routed (token,
    head) pairs are computed, on CPU.
    """

    name: ClassVar[str] = "blocked"
    skips: ClassVar[bool] = True
    skips_rows: bool = False

    def check(self, spec: AttentionSpec) -> Refusal | None:
        if spec.selection is not None and spec.selection.block % BLOCK:
            found = f"blocks of {spec.selection.block}"
            return Refusal("other-blocks", expected=f"a block size that is a multiple of {BLOCK}", found=found)
        if not is_readable(spec.pattern):
            hint = "decorate its class with @attnopt.register, and make its repr the call that constructs it"
            return Refusal(
                "unnamed-pattern",
                expected="a pattern that can be reconstructed from its text",
                found=str(spec.pattern),
                hint=hint,
            )
        return None

    def lower(self, spec: AttentionSpec) -> RoutedAttend:
        require_no_edits(spec)

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
            kept = None
            if spec.selection is not None:
                kept = spec.selection.spread(selected(spec, q, k), q.shape[2], k.shape[2], BLOCK)
            pattern = spec.pattern.to_json()
            o: Tensor = attention(
                q, k, v, bias, mask, sinks, pattern, spec.kv_of_head, spec.scale, spec.softcap, kept, wanted
            )
            return o

        return attend

    def cost(self, site: Site) -> float:
        tiles = COMPILED if site.device == "cpu" else FLEX
        visits = tiles.share(site.spec.pattern, site.q_len, site.kv_len, site.spec.num_heads)
        if site.spec.selection is not None:
            visits *= site.spec.selection.share(site.kv_len)
        if site.device != "cpu":
            return visits * dense_flops(site) / (_FLEX_RATE * GPU_RATE)
        speed = of_cpu()
        return speed.blocked_call + visits * dense_flops(site) / speed.blocked

    def skipping_rows(self) -> Blocked:
        return replace(self, skips_rows=True)

    def notes(self, spec: AttentionSpec) -> tuple[str, ...]:
        reason = native.why_not()
        return () if reason is None else (f"blocked: using torch operators instead of the compiled kernel: {reason}",)
