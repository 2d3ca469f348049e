"""The specification itself as a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from attnopt.backends.speed import GPU_RATE, dense_flops, of_cpu
from attnopt.ir.attend import Attend
from attnopt.ir.interfaces import Backend
from attnopt.ir.reference import reference
from attnopt.ir.semantics import of_masked_blocks
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec

_CALLS = 8  # operators, each of which has to be called


class Reference(Backend):
    """Plain tensor operations; accepts every spec; scores and softmax in float32 or wider, the output in v's dtype."""

    name: ClassVar[str] = "reference"
    channels: ClassVar[bool] = True
    head_maps: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    sends: ClassVar[bool] = True
    clamps: ClassVar[bool] = True
    pools: ClassVar[bool] = True
    zero_keys: ClassVar[bool] = True
    extends: ClassVar[bool] = True
    weight_gains: ClassVar[bool] = True
    gain_segments: ClassVar[bool] = True
    rows: ClassVar[bool] = True

    def lower(self, spec: AttentionSpec) -> Attend:
        return reference(spec)

    def cost(self, site: Site) -> float:
        if site.device != "cpu":
            return 3.0 * dense_flops(site) / GPU_RATE
        speed, more = of_cpu(site), site.spec.extension
        site = site if more is None else replace(site, kv_len=site.kv_len + more.tokens)
        return _CALLS * speed.dense_call + 3.0 * dense_flops(site) / speed.masked

    def notes(self, spec: AttentionSpec) -> tuple[str, ...]:
        return of_masked_blocks(self.name, spec)
