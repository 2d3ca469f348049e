"""A hand-made site, and what a pass makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attnopt.ir.interfaces import Pass
from attnopt.ir.projection import Projection
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec

D, WIDTH = 3, 8


def rows(heads: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(h * D, h * D + D)) for h in range(heads))


def a_site(heads: int = 4, kv_heads: int = 4, *, weights: bool = True, bias: bool = True, **changes: Any) -> Site:
    """Self-attention over 12 tokens; "out" is stored as (in, out) to exercise ``transposed``."""
    torch.manual_seed(0)
    counts = {"q": heads, "k": kv_heads, "v": kv_heads, "out": heads}
    parameters = {f"{role}.weight": torch.randn(n * D, WIDTH) for role, n in counts.items()}
    parameters |= {f"{role}.bias": torch.randn(n * D) for role, n in counts.items()}
    projections = {
        role: Projection(
            f"{role}.weight",
            f"{role}.bias" if bias else None,
            transposed=role == "out",
            rows=rows(n) if weights else None,
            why=None if weights else "a pooling stands in between",
        )
        for role, n in counts.items()
    }
    kv_of_head = tuple(h * kv_heads // heads for h in range(heads))
    spec = AttentionSpec(tuple(range(heads)), tuple(range(kv_heads)), kv_of_head, D, D, 0.5)
    site = Site("encoder.0.attn", spec, projections, "model.py:88", parameters=parameters, q_len=12, kv_len=12)
    own = {k: v for k, v in changes.items() if k in ("q_len", "kv_len", "is_dynamic")}
    return replace(site, spec=replace(spec, **{k: v for k, v in changes.items() if k not in own}), **own)


def applied(p: Pass, site: Site) -> Site:
    assert p.check(site) is None
    return replace(site, spec=p.rewrite(site).spec)


def refusal(p: Pass, site: Site) -> str:
    refused = p.check(site)
    assert refused is not None
    return str(refused)


def wrong(value: Any) -> Any:
    """A value that a type checker would not let through."""
    return value
