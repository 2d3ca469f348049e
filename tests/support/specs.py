"""Specs with their operands, and what a backend gives for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.interfaces import Backend
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Blocks, Causal, Full, Global, Pattern, PerHead, Sinks, Span, Strided, Window

D = 8


PATTERNS: list[Pattern] = [
    Full(),
    Causal(),
    Window(2, 0),
    Window(1),
    Causal() & (Window(2, 0) | Sinks(1)),
    Blocks(3, 1),
    Blocks(3, 2, edge="shift"),
    Causal() & (Span(1, 0, 0.25) | Sinks(1)),
    Strided(2) | Global((0, 3)),
    ~Causal(),
    ~Full(),
    PerHead({0: Causal(), 1: Window(1)}),
    Window(100),
]


def a_spec(heads: int = 4, kv_of_head: tuple[int, ...] | None = None, **changes: Any) -> AttentionSpec:
    kv = tuple(range(heads)) if kv_of_head is None else kv_of_head
    spec = AttentionSpec(tuple(range(heads)), tuple(range(max(kv) + 1)), kv, D, D, D**-0.5)
    return replace(spec, **changes)


def tensors(spec: AttentionSpec, B: int, L: int, S: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    H, G = spec.num_heads, spec.num_kv_heads
    hidden = torch.rand((B, 1, L, S), generator=g) < 0.6
    return {
        "q": random(B, H, L, spec.head_dim),
        "k": random(B, G, S, spec.head_dim),
        "v": random(B, G, S, spec.value_dim),
        "bias": random(1, H, L, S) if spec.has_bias else None,
        "mask": ~hidden if spec.has_mask else None,
        "sinks": random(1, H, 1, 1) if spec.has_sinks else None,
    }


def run(backend: Backend, spec: AttentionSpec, given_: dict[str, Any]) -> Tensor:
    t = dict(given_)
    return backend.lower(spec)(t.pop("q"), t.pop("k"), t.pop("v"), **t)
