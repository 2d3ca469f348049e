"""Attention that computes only the blocks its pattern keeps: time and memory grow with these, not quadratically."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

from torch import Tensor

from attnopt.backends import native
from attnopt.backends.attention_operator import attention, attention_with_lse
from attnopt.backends.by_segment import sorted_by_segment
from attnopt.backends.speed import GPU_RATE, dense_flops, of_cpu
from attnopt.ir.attend import Attend, AttendWithLse, RoutedAttend
from attnopt.ir.extension import joined, joined_spec, joins_simply, merged
from attnopt.ir.interfaces import Backend
from attnopt.ir.lse_merge import merged_by_lse
from attnopt.ir.operands import BLOCK, SegmentTensors
from attnopt.ir.refusal import Refusal
from attnopt.ir.semantics import require_no_edits, selected
from attnopt.ir.sent_values import exchanged, sent
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.algebra import FULL, Pattern
from attnopt.patterns.registry import is_readable
from attnopt.patterns.tile_cost import COMPILED, FLEX

_FLEX_RATE = 0.7  # of SDPA's, for the pairs that it computes
_SEEN = 0.5  # a guess at the pairs that segments leave, whose ids are not known before a call
_TWICE = 1.5  # products of queries and keys are computed for keys and again for queries


@dataclass(frozen=True)
class Blocked(Backend):
    """One ``attnopt::attention`` call: a compiled CPU kernel, FlexAttention, or torch operators block by block.

    Gains on weights take one call for each part of the pairs, and a merge; a softmax over queries takes two calls.  Accepts
    every spec whose selection has whole blocks, with static or dynamic lengths; its block layout is computed once the lengths
    are known, and cached.
    ``skips_rows``: if tokens are routed to heads, only the routed (token, head) pairs are computed, on CPU.
    """

    name: ClassVar[str] = "blocked"
    skips: ClassVar[bool] = True
    sends: ClassVar[bool] = True
    weight_gains: ClassVar[bool] = True
    extends: ClassVar[bool] = True
    segments: ClassVar[bool] = True
    gain_segments: ClassVar[bool] = True
    skips_rows: bool = False

    def check(self, spec: AttentionSpec) -> Refusal | None:
        if spec.selection is not None and spec.selection.block % BLOCK:
            found = f"blocks of {spec.selection.block}"
            return Refusal("other-blocks", expected=f"a block size that is a multiple of {BLOCK}", found=found)
        if spec.sends and exchanged(spec.pattern) is None:
            expected = "all pairs or a window, which keys see from the other side"
            return Refusal("not-exchanged", expected=expected, found=str(spec.pattern))
        if not all(map(is_readable, (spec.pattern, *_pieces(spec)))):
            hint = "decorate its class with @attnopt.register, and make its repr the call that constructs it"
            return Refusal(
                "unnamed-pattern",
                expected="a pattern that can be reconstructed from its text",
                found=str(spec.pattern),
                hint=hint,
            )
        return None

    def lower(self, spec: AttentionSpec) -> RoutedAttend | Attend:
        require_no_edits(spec, extends=True)
        if spec.extension is not None:
            if joins_simply(spec):
                return cast(Attend, joined(spec, self.lower(joined_spec(spec))))
            return cast(Attend, merged(spec, self._with_lse))
        if spec.sends:
            return sent(spec, self._with_lse)
        if spec.weight_gains is not None:
            return merged_by_lse(spec, self._with_lse)

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            bias: Tensor | None,
            mask: Tensor | None,
            sinks: Tensor | None,
            wanted: Tensor | None = None,
            segments: SegmentTensors | None = None,
        ) -> Tensor:
            ids = () if segments is None else (segments.queries, segments.keys, segments.pairs)
            o: Tensor = attention(q, k, v, bias, mask, sinks, *_options(spec, q, k), wanted, *ids)
            return o

        return attend

    def _with_lse(self, spec: AttentionSpec) -> AttendWithLse:
        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            bias: Tensor | None,
            mask: Tensor | None,
            sinks: Tensor | None,
            segments: SegmentTensors | None = None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            ids = () if segments is None else (segments.queries, segments.keys, segments.pairs)
            o, top, log_sum = attention_with_lse(q, k, v, bias, mask, sinks, *_options(spec, q, k), *ids)
            return o, top, log_sum

        return attend

    def cost(self, site: Site) -> float:
        if (more := site.spec.extension) is not None:
            own = replace(site, spec=replace(site.spec, extension=None))
            if joins_simply(site.spec):
                return self.cost(replace(own, kv_len=site.kv_len + more.tokens))
            beside = replace(own.spec.keeping(more.heads), pattern=FULL, selection=None)
            return self.cost(own) + self.cost(replace(own, spec=beside, kv_len=more.tokens))
        tiles = COMPILED if site.device == "cpu" else FLEX
        pattern = sorted_by_segment(site.spec.pattern)
        parts = [pattern & piece for piece in _pieces(site.spec)] or [pattern]
        visits = sum(tiles.share(part, site.q_len, site.kv_len, site.spec.num_heads) for part in parts)
        if site.spec.selection is not None:
            visits *= site.spec.selection.share(site.kv_len)
        if site.spec.segments is not None:
            visits *= _SEEN
        if site.spec.sends:
            visits *= _TWICE
        if site.device != "cpu":
            return visits * dense_flops(site) / (_FLEX_RATE * GPU_RATE)
        speed = of_cpu(site)
        calls = 1 if site.spec.weight_gains is None else site.spec.weight_gains.count
        calls *= 1 + site.spec.sends
        return calls * speed.blocked_call + visits * dense_flops(site) / speed.blocked

    def skipping_rows(self) -> Blocked:
        return replace(self, skips_rows=True)

    def notes(self, spec: AttentionSpec) -> tuple[str, ...]:
        reason, gains = native.why_not(), spec.weight_gains
        apart = spec.extension is not None and not joins_simply(spec)
        what = "own and other keys apart" if gains is None else f"{gains.count} parts of the pairs"
        merged = (f"blocked: computes {what} and merges them; ONNX Runtime computes each densely",)
        once = spec.pattern == FULL and spec.num_kv_heads == spec.num_heads
        in_file = "a block of keys at a time, once" if once else "both densely"
        twice = (f"blocked: scores are computed for keys and again for queries; ONNX Runtime computes them {in_file}",)
        slow = (f"blocked: using torch operators instead of the compiled kernel: {reason}",)
        first = twice if spec.sends else merged if apart or gains is not None else ()
        return (*first, *(() if reason is None else slow))


def _options(
    spec: AttentionSpec, q: Tensor, k: Tensor
) -> tuple[str, tuple[int, ...], float, float | None, Tensor | None]:
    """The arguments of the operators that follow the operands."""
    kept = None
    if spec.selection is not None:
        kept = spec.selection.spread(selected(spec, q, k), q.shape[2], k.shape[2], BLOCK)
    return spec.pattern.to_json(), spec.kv_of_head, spec.scale, spec.softcap, kept


def _pieces(spec: AttentionSpec) -> tuple[Pattern, ...]:
    """None for gains whose ids a call brings: together, they compute each pair about once."""
    gains = spec.weight_gains
    return () if gains is None or gains.segments is not None else gains.pieces
