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
    parser.add_argument(
        "--grids", type=_grid, nargs="+", default=[(100, 18), (64, 64)], help="rows x columns, as 100x18"
    )
    arguments = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    rows = list(measured(arguments.tokens, arguments.regions, arguments.rounds))
    publish("segments", rows, f"Attention within regions of {arguments.tokens} tokens: CPU time")
    publish(
        "segment_grids", list(of_grids(arguments.grids, arguments.rounds)), "Attention along rows and columns: CPU time"
    )
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


def of_grids(grids: list[tuple[int, int]], rounds: int) -> Iterator[dict[str, Any]]:
    """Segments that are known, in a grid of tokens: within the instances of Group Pose (100, of 17 keypoints and one more token
    each) and across them, or axial attention."""
    for rows, columns in grids:
        q, k, v = (torch.randn(1, rows * columns, HEADS * SIZE) for _ in range(3))
        ids = {
            "rows": [n // columns for n in range(rows * columns)],
            "columns": [n % columns for n in range(rows * columns)],
        }
        dense = attnopt.optimize(Core(), "fuse", (q, k, v))
        for axis, own in ids.items():
            policy, calls = Sparse(Segments(own)), {"dense": lambda dense=dense, x=(q, k, v): dense(*x)}
            for backend in ("auto", "blocked"):
                fast = attnopt.optimize(Core(), policy, (q, k, v), backend=backend)
                calls[backend] = lambda fast=fast, x=(q, k, v): fast(*x)
            masked = Masked(torch.tensor(own)[:, None] == torch.tensor(own))
            calls["mask"] = lambda masked=masked, x=(q, k, v): masked(*x)
            with torch.no_grad():
                times = interleaved(calls, rounds, 1)
            yield {
                "grid": f"{rows} x {columns}",
                "along": axis,
                "bound": rows if axis == "rows" else columns,
                "dense / batch": times.ratio("dense", "auto"),
                "dense / blocked": times.ratio("dense", "blocked"),
                "dense / mask": times.ratio("dense", "mask"),
            }


class Masked(nn.Module):
    """By hand, as torch's own attention takes a mask."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for x in (q, k, v))
        made: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, self.seen).transpose(1, 2).flatten(2)
        return made


def _grid(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


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
