"""Attention without a softmax by way of a state: time and memory grow with the tokens, not with their pairs.

(Q K^T) V is Q (K^T V).  If queries see earlier keys alone, tokens are cut into chunks: pairs within a chunk are computed as such,
and all that came before is a state, the sum of k v^T, which fades from chunk to chunk (Lightning Attention, arXiv:2401.04658).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnopt.backends.speed import GPU_RATE, dense_flops, of_cpu
from attnopt.base.sizes import is_static
from attnopt.ir.attend import Attend
from attnopt.ir.interfaces import Backend
from attnopt.ir.linear_weights import LinearWeights
from attnopt.ir.reference import reference
from attnopt.ir.refusal import Refusal
from attnopt.ir.semantics import heads_of, require_no_edits
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal
from attnopt.patterns.algebra import FULL

CHUNK = 128  # tokens whose pairs are computed as such
_STATES = 16  # chunks whose states are summed together, before such sums are
_CALLS = 4  # operators, each of which has to be called, for the pairs of one chunk


class Chunked(Backend):
    """Plain torch operators, for static and dynamic lengths; sums in float32 or wider, the output in v's dtype."""

    name: ClassVar[str] = "chunked"
    linear: ClassVar[bool] = True

    def check(self, spec: AttentionSpec) -> Refusal | None:
        if spec.linear is None:
            return Refusal("needs-linear", expected="an attention without a softmax", found="a softmax")
        if spec.pattern not in (FULL, Causal()) or spec.has_mask:
            found = "a mask" if spec.has_mask else str(spec.pattern)
            return Refusal("no-state", expected="queries that see all keys, or all earlier ones", found=found)
        return None

    def lower(self, spec: AttentionSpec) -> Attend:
        require_no_edits(spec)
        weights, by_pairs = spec.linear, reference(spec)
        assert weights is not None

        def attend(
            q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
        ) -> Tensor:
            given = {"bias": bias, "mask": mask, "sinks": sinks}
            is_causal = spec.pattern == Causal()
            if is_causal and not statically_known_true(k.shape[2] == q.shape[2]):
                return by_pairs(q, k, v, **given)
            if is_causal and is_static(q.shape[2]) and q.shape[2] <= CHUNK:
                return by_pairs(q, k, v, **given)
            wide = torch.promote_types(q.dtype, torch.float32)
            q_, k_, v_ = q.to(wide) * spec.scale, heads_of(spec, k).to(wide), heads_of(spec, v).to(wide)
            if weights.divides:
                v_ = F.pad(v_, (0, 1), value=1.0)  # whose sum is that of the weights
            o = _causal(weights, q_, k_, v_) if is_causal else q_ @ (k_.mT @ v_)
            if weights.divides:
                o = o[..., :-1] / weights.divisor(o[..., -1:])
            return o.to(v.dtype)

        return attend

    def cost(self, site: Site) -> float:
        spec, pairs = site.spec, dense_flops(site)
        of_state = 2.0 * site.batch * spec.num_heads * (site.q_len + site.kv_len) * spec.head_dim * spec.value_dim
        within = pairs * min(1.0, CHUNK / site.kv_len) if spec.pattern == Causal() else 0.0
        flops = min(pairs, of_state + within)
        if site.device != "cpu":
            return flops / GPU_RATE
        speed = of_cpu(site)
        return _CALLS * speed.dense_call + flops / speed.masked


def _causal(weights: LinearWeights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, L, Dv], from scaled queries, and keys and values of each head."""
    length = q.shape[2]
    q, k, v = (_in_chunks(x, CHUNK) for x in (q, k, v))  # [B, H, N, C, *]
    steps = torch.arange(CHUNK, device=q.device)
    pairs = (q @ k.mT) * _fading(weights, steps[:, None] - steps, q.dtype).unsqueeze(2)
    own = pairs @ v
    if weights.rates:
        k = k * weights.faded(CHUNK - 1 - steps, k.dtype)[:, :, None, :, None]
        q = q * weights.faded(steps + 1, q.dtype)[:, :, None, :, None]
    states = (k.mT @ v).flatten(3)  # at the end of each chunk, of its own tokens
    before = _sums_before(weights, states, CHUNK)
    before = before.reshape(*before.shape[:3], k.shape[-1], v.shape[-1])
    return (own + q @ before).flatten(2, 3)[:, :, :length]


def _sums_before(weights: LinearWeights, x_BHNF: Tensor, tokens: int) -> Tensor:
    """Of each chunk the sum of all before it, which fade by the ``tokens`` from one to the next.  Of many,
    sums of sums."""
    chunks = x_BHNF.shape[2]
    if is_static(chunks) and chunks <= _STATES:
        return _sums_within(weights, x_BHNF, tokens)
    parts = _in_chunks(x_BHNF, _STATES)  # [B, H, M, _STATES, F]
    steps = torch.arange(_STATES, device=x_BHNF.device) * tokens
    totals = parts
    if weights.rates:
        totals = parts * weights.faded(steps.flip(0), parts.dtype)[:, :, None, :, None]
    carried = _sums_within(weights, totals.sum(3), tokens * _STATES).unsqueeze(3)
    if weights.rates:
        carried = carried * weights.faded(steps, parts.dtype)[:, :, None, :, None]
    return (_sums_within(weights, parts, tokens) + carried).flatten(2, 3)[:, :, :chunks]


def _sums_within(weights: LinearWeights, x: Tensor, tokens: int) -> Tensor:
    """The same over the axis before the last, [B, H, (M,) N, F], with all pairs of chunks."""
    places = torch.arange(x.shape[-2], device=x.device)
    pairs = _fading(weights, (places[:, None] - places - 1) * tokens, x.dtype)
    return (pairs if x.dim() == 4 else pairs.unsqueeze(2)) @ x


def _fading(weights: LinearWeights, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, H or 1, *]: what is left of weights at these distances, 0 below 0."""
    left = weights.faded(distance, dtype) if weights.rates else torch.ones_like(distance, dtype=dtype)[None, None]
    return left.masked_fill(distance < 0, 0.0)


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """[B, H, N, *] as [B, H, chunks, size, *], filled with zeros at the end.  At least two chunks if the length is free: torch
    takes a size that is 1 in the example for 1 at all sizes."""
    B, H, length, features = x.shape
    chunks = -(-length // size) if is_static(length) else length // size + 2
    return F.pad(x, (0, 0, 0, chunks * size - length)).reshape(B, H, chunks, size, features)
