"""The specification as code: the formula of ``AttentionSpec``, line by line, for any spec; simple and slow."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.ir.attend import Attend
from attnopt.ir.semantics import heads_of, require_no_edits, visible
from attnopt.ir.spec import AttentionSpec


def reference(spec: AttentionSpec) -> Attend:
    """Plain tensor operations; scores and softmax in float32 or wider, the output in v's dtype.  Raises ValueError if
    ``spec`` has edits: see ``semantics.edited``."""
    require_no_edits(spec, pools=True)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        k_BHSD, v_BHSD = heads_of(spec, k).to(wide), heads_of(spec, v).to(wide)
        if spec.pooling is not None:
            k_BHSD, v_BHSD = spec.pooling.applied(spec.heads, k_BHSD), spec.pooling.applied(spec.heads, v_BHSD)
        s = spec.scale * (q.to(wide) @ k_BHSD.mT)
        if spec.softcap is not None:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        if bias is not None:
            s = s + bias.to(wide)
        if spec.pooling is not None:
            s = s + spec.pooling.log_weights_of(spec.heads, k.shape[2], wide, k.device)
        seen = visible(spec, q, k, mask)
        if seen is not None:
            s = s.masked_fill(~seen, -torch.inf)
        o = _softmax(s, None if sinks is None else sinks.to(wide)) @ v_BHSD
        return o.to(v.dtype)

    return attend


def _softmax(s: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis and the sink logit; a row of only -inf becomes zeros."""
    top = s.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return p / total.masked_fill(total == 0.0, 1.0)
