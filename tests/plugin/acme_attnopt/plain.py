"""A backend: from a spec to a function of tensors."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt import Attend, AttentionSpec, Backend, Refusal, Site


class Plain(Backend):
    """Scores, mask and softmax, step by step."""

    name: ClassVar[str] = "acme.plain"

    def check(self, spec: AttentionSpec) -> Refusal | None:
        extra = [n for n in ("softcap", "selection", "has_bias", "has_sinks") if getattr(spec, n)]
        return Refusal("not-plain", expected="a plain softmax", found=", ".join(extra)) if extra else None

    def lower(self, spec: AttentionSpec) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Any, mask: Any, sinks: Any) -> Tensor:
            seen = spec.pattern.mask(q.shape[2], k.shape[2], num_heads=spec.num_heads, device=q.device)
            seen, groups = seen if mask is None else seen & mask, list(spec.kv_of_head)
            o = (q @ k[:, groups].mT * spec.scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, groups]
            return torch.where(seen.any(-1, keepdim=True), o, 0)  # zeros for fully masked queries

        return attend

    def cost(self, site: Site) -> float:
        return 1e-9 * site.num_heads * site.q_len * site.kv_len
