"""Attention within segments of tokens whose ids each call brings: time against the same attention between all tokens, against a
mask, and with ids that are sorted already; beside what the pairs alone would allow.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from common import interleaved, one_thread, picture, publish
from torch import Tensor, nn

import attnopt
from attnopt import Input
from attnopt.passes import Sparse
from attnopt.patterns import Segments

HEADS, SIZE = 12, 64


class Core(nn.Module):
    """The attention alone, as a model hands it over: heads in the middle of what a projection gave."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for x in (q, k, v))
        made: Tensor = ((q @ k.mT / math.sqrt(SIZE)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--regions", type=int, nargs="+", default=[4, 16, 64])
    arguments = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    rows = list(measured(arguments.tokens, arguments.regions, arguments.rounds))
    publish("segments", rows, f"Attention within regions of {arguments.tokens} tokens: CPU time")
    draw(rows)


def measured(tokens: int, regions: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    q, k, v = (torch.randn(1, tokens, HEADS * SIZE) for _ in range(3))
    n = torch.export.Dim("tokens", min=2)
    example = tuple(x[:, :64] for x in (q, k, v))
    shapes = {name: {1: n} for name in ("q", "k", "v")}
    dense = attnopt.optimize(Core(), "fuse", example, dynamic_shapes=shapes, backend="blocked")
    for count in regions:
        ids = torch.randint(0, count, (1, tokens))
        sizes = torch.bincount(ids[0]).double()
        policy, given = Sparse(Segments(Input("region_ids"))), {"region_ids": ids[:, :64]}
        fast, masked = (
            attnopt.optimize(Core(), policy, example, given, dynamic_shapes=shapes, backend=backend)
            for backend in ("blocked", "sdpa")
        )
        known = attnopt.optimize(Core(), Sparse(Segments(ids[0])), (q, k, v), backend="blocked")
        in_order = ids.sort(1).values
        calls = {
            "dense": lambda: dense(q, k, v),
            "scattered": lambda fast=fast, ids=ids: fast(q, k, v, region_ids=ids),
            "sorted": lambda fast=fast, ids=in_order: fast(q, k, v, region_ids=ids),
            "known": lambda known=known: known(q, k, v),
            "mask": lambda masked=masked, ids=ids: masked(q, k, v, region_ids=ids),
        }
        with torch.no_grad():
            times = interleaved(calls, rounds, 1)
        bound = tokens**2 / float((sizes * sizes).sum())
        yield {
            "regions": count,
            "bound": bound,
            "dense / scattered": times.ratio("dense", "scattered"),
            "share of bound": times.ratio("dense", "scattered") / bound,
            "scattered / sorted": times.ratio("scattered", "sorted"),
            "dense / known ids": times.ratio("dense", "known"),
            "dense / mask": times.ratio("dense", "mask"),
        }


def draw(rows: list[dict[str, Any]]) -> None:
    def panels(_: Any, axes: Any) -> None:
        regions = [r["regions"] for r in rows]
        for key in ("bound", "dense / scattered", "dense / known ids", "dense / mask"):
            axes.loglog(regions, [r[key] for r in rows], "o-", label=key)
        axes.set_xlabel("regions")
        axes.set_ylabel("times faster than between all tokens")
        axes.legend()

    picture("segments", panels, panels=1)


if __name__ == "__main__":
    main()
