"""Fewer heads: how much of the ideal speed-up of attention and its projections together arrives.

Ideal is the ratio of multiplications.  The base is the same model with all heads, fused; both run in torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from common import interleaved, one_thread, picture, publish
from torch import Tensor, nn

import attnopt
from attnopt.passes import GroupedQuery, PruneHeads

WIDTH, HEADS, LAYERS = 768, 12, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made


def multiplications(length: int, heads: int, kv_heads: int) -> float:
    """Of one layer: four projections, scores and weighted values."""
    size = WIDTH // HEADS
    projections = length * WIDTH * size * (2 * heads + 2 * kv_heads)
    return projections + 2 * length * length * size * heads


def cases() -> Iterator[tuple[str, Any, int, int]]:
    """(name, pass, query heads, KV heads)"""
    for fraction in (0.25, 0.5, 0.75):
        left = HEADS - round(HEADS * fraction)
        yield f"{left} of 12 heads", PruneHeads(fraction), left, left
    for kv_heads in (6, 3, 1):
        yield f"12 -> {kv_heads} KV heads", GroupedQuery(kv_heads), HEADS, kv_heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    arguments = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention() for _ in range(LAYERS))).eval()
    rows = [r for length in arguments.lengths for r in measured(model, length, arguments.rounds)]
    publish("heads_speed", rows, "Fewer heads: attention and its projections, CPU time against the same model fused")
    draw(rows)


def measured(model: nn.Module, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    x = torch.randn(max(1, 1024 // length), length, WIDTH)
    every = {name: attnopt.optimize(model, policy, (x,)) for name, policy, _, _ in cases()}
    whole = attnopt.optimize(model, "fuse", (x,))

    def call(module: nn.Module) -> Any:
        with torch.no_grad():
            return module(x)

    calls = {name: (lambda m=m: call(m)) for name, m in {"fused": whole, **every}.items()}
    times = interleaved(calls, rounds, 2)
    for name, _, heads, kv_heads in cases():
        ideal = multiplications(length, HEADS, HEADS) / multiplications(length, heads, kv_heads)
        got = times.ratio("fused", name)
        yield {"length": length, "left": name, "speed-up": got, "ideal": ideal, "share": got / ideal}


def draw(rows: list[dict[str, Any]]) -> None:
    def paint(_: Any, axes: Any) -> None:
        for name in dict.fromkeys(r["left"] for r in rows):
            mine = [r for r in rows if r["left"] == name]
            axes.plot([r["length"] for r in mine], [100 * r["share"] for r in mine], marker="o", label=name)
        axes.axhline(95, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="sequence length", ylabel="% of the ideal speed-up")
        axes.legend(fontsize=7)

    picture("heads_speed", paint)


if __name__ == "__main__":
    main()
