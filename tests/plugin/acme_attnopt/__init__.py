"""A whole plugin for attnopt: one pass and one backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.patterns import Window
from attnopt.refusal import Refusal
from attnopt.rewriting import Attend, Backend, Pass, Rewrite
from attnopt.site import Site
from attnopt.spec import AttentionSpec


@dataclass(frozen=True)
class LastK(Pass):
    """Each query sees itself and the ``keys - 1`` keys before it."""

    name: ClassVar[str] = "acme.last-k"
    exact: ClassVar[bool] = False
    keys: int

    def check(self, site: Site) -> Refusal | None:
        return None if site.spec.is_causal else site.refuse("needs-causal", found=site.spec.pattern)

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec.restricted(Window(left=self.keys - 1, right=0)))


class Plain(Backend):
    """Scores, mask and softmax, one after the other."""

    name: ClassVar[str] = "acme.plain"

    def check(self, spec: AttentionSpec) -> Refusal | None:
        if spec.has_sinks or spec.softcap is not None:
            return Refusal("no-sinks-or-softcap", expected="a plain softmax")
        return None

    def lower(self, spec: AttentionSpec) -> Attend:
        gains = torch.tensor(spec.gains or (1.0,) * spec.num_heads).view(1, -1, 1, 1)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
        ) -> Tensor:
            k_BHSD, v_BHSD = k[:, list(spec.kv_of_head)], v[:, list(spec.kv_of_head)]
            s_BHLS = (q @ k_BHSD.mT) * spec.scale
            if bias is not None:
                s_BHLS = s_BHLS + bias
            seen = spec.pattern.mask(q.shape[-2], k.shape[-2], num_heads=spec.num_heads, device=q.device)
            if mask is not None:
                seen = seen & mask
            p_BHLS = s_BHLS.masked_fill(~seen, -math.inf).softmax(-1)
            return torch.where(seen.any(-1, keepdim=True), p_BHLS @ v_BHSD, 0) * gains.to(q)

        return attend

    def cost(self, site: Site) -> float:
        return 1e-9 * site.num_heads * site.q_len * site.kv_len
