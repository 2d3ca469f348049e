"""An attention call of a graph in its canonical form: the spec that it computes, and its operands.

Lowering notes the spec at each call.  What a backend made of the operands stands in the call's arguments: the pattern is
part of torch's mask, and has to be taken out of it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from attnopt.backends.attention_operator import ATTENTION
from attnopt.base.sizes import hint, is_static, same_size
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import dtype, is_call, shape, value
from attnopt.graph.sdpa import SdpaArguments, sdpa_arguments
from attnopt.ir.operands import Operands
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.attention_calls import Lowered, lowered_at
from attnopt.lower.operator_calls import called_spec, of_operator
from attnopt.onnx.export.choose_form import OnnxSite
from attnopt.onnx.export.mask_split import without_pattern
from attnopt.patterns import Causal, Full, Pattern


@dataclass(frozen=True)
class Canonical:
    """``lowered``: what lowering noted at the call; None for a call of the model itself."""

    site: OnnxSite
    operands: Operands[fx.Node]
    lowered: Lowered | None

    def having(self, operands: Operands[fx.Node], pattern: Pattern) -> Canonical:
        """The same attention with other operands beside queries, keys and values, and the pattern that is left."""
        spec = replace(self.site.spec, pattern=pattern).having(operands.bias, operands.mask, operands.sinks)
        return replace(self, site=replace(self.site, spec=spec), operands=operands)


def canonical(emit: Emitter, call: fx.Node) -> Canonical | None:
    """None if it stays as it is: it draws random numbers, or computes its scale at run time."""
    lowered = lowered_at(call)
    if is_call(call, ATTENTION):
        operands, own = of_operator(emit, call)
    else:
        given = sdpa_arguments(call)
        if given.dropout_p or given.scale is None:
            return None
        operands, own = _of_sdpa(emit, given, Full() if lowered is None else lowered.spec.pattern)
    return Canonical(site_of(call.name if lowered is None else lowered.site, own, operands), operands, lowered)


def _of_sdpa(emit: Emitter, given: SdpaArguments, known: Pattern) -> tuple[Operands[fx.Node], AttentionSpec]:
    """``known``: the pattern that its mask may contain."""
    assert given.scale is not None
    q, k, v, attn_mask = given.query, given.key, given.value, given.attn_mask
    if len(value(q).shape) != 4:
        q, k, v, attn_mask = _four_axes(emit, q, k, v, attn_mask)
    heads, kv_heads = shape(q)[1], shape(k)[1]
    kv_of_head = tuple(h * kv_heads // heads for h in range(heads)) if given.enable_gqa else tuple(range(heads))
    pattern: Pattern = Full()
    bias = mask = None
    if given.is_causal and same_size(value(q).shape[2], value(k).shape[2]):
        pattern = Causal()
    elif given.is_causal:  # the triangle is aligned with the first key; a pattern's with the last
        mask = emit.inline(lambda a, b: a.new_ones(a.shape[2], b.shape[2], dtype=torch.bool).tril(), q, k)
    elif attn_mask is not None:
        bias, mask = (None, attn_mask) if dtype(attn_mask) == torch.bool else (attn_mask, None)
    if known != Full() and attn_mask is not None:
        bias, mask, is_implied = without_pattern(emit, bias, mask, known, heads)
        pattern = known if is_implied else pattern
    operands = Operands(q, k, v, bias, mask)
    return operands, called_spec(operands, kv_of_head, given.scale, pattern)


def _four_axes(
    emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None
) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
    """Operands of 3 axes, or of more than 4, with one head per index of their leading axes."""

    def four(x: Tensor) -> Tensor:
        return x.reshape(-1, 1, *x.shape[-2:])

    if mask is not None and len(value(mask).shape) > 2:
        mask = emit.inline(lambda m, q: four(m.expand(*q.shape[:-2], *m.shape[-2:])), mask, q)
    return emit.inline(four, q), emit.inline(four, k), emit.inline(four, v), mask


def site_of(name: str, spec: AttentionSpec, operands: Operands[fx.Node]) -> OnnxSite:
    batch, _, q_len, _ = value(operands.q).shape
    kv_len = value(operands.k).shape[2]
    return OnnxSite(
        name,
        spec,
        dtype(operands.q),
        batch=hint(batch),
        q_len=hint(q_len),
        kv_len=hint(kv_len),
        is_static=is_static(q_len) and is_static(kv_len),
        is_square=same_size(q_len, kv_len),
    )
