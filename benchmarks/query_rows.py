"""Attention of some queries only, chosen at run time: CPU time against that of all queries, in torch and in ONNX Runtime."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import interleaved, one_thread, picture, publish
from onnx_sessions import runner
from torch import Tensor, nn

import attnopt
from attnopt.passes import Fuse, QueryRows

HEADS, SIZE = 12, 64
SCORES = ("norm", "received(stride=8)", "received")


class Core(nn.Module):
    """The attention alone, as a model hands it over: heads in the middle of what a projection gave."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for x in (q, k, v))
        made: Tensor = ((q @ k.mT / math.sqrt(SIZE)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.125, 0.25, 0.5, 0.75])
    arguments = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    rows = [row for n in arguments.lengths for row in measured(n, arguments.keep, arguments.rounds)]
    publish("query_rows", rows, "Attention of chosen queries: CPU time / that of all queries, the choice included")
    draw(rows)


def measured(length: int, shares: list[float], rounds: int) -> Iterator[dict[str, Any]]:
    args = tuple(torch.randn(1, length, HEADS * SIZE) for _ in range(3))
    policies = {(s, r): QueryRows(s, keep=r) for s in SCORES for r in shares}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        in_torch, in_onnx = calls(
            {"all": Fuse(), **{f"{s} {r}": p for (s, r), p in policies.items()}}, args, Path(folder)
        )
        times, times_onnx = interleaved(in_torch, rounds, 1), interleaved(in_onnx, rounds, 1)
    for score, share in policies:
        name = f"{score} {share}"
        yield {
            "tokens": length,
            "score": score,
            "share of rows": f"{share:g}",
            "torch": times.ratio(name, "all"),
            "ONNX Runtime": times_onnx.ratio(name, "all"),
        }


def calls(
    policies: dict[str, Any], args: tuple[Tensor, ...], folder: Path
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    in_torch: dict[str, Callable[[], object]] = {}
    in_onnx: dict[str, Callable[[], object]] = {}
    for n, (name, policy) in enumerate(policies.items()):
        fast = attnopt.optimize(Core(), policy, args)
        fast.export_onnx(folder / f"{n}.onnx")
        in_torch[name] = lambda fast=fast: fast(*args)
        in_onnx[name] = runner(folder / f"{n}.onnx", args)
    return in_torch, in_onnx


def draw(rows: list[dict[str, Any]]) -> None:
    def panels(_: Any, axes: Any) -> None:
        for ax, column in zip(axes, ("torch", "ONNX Runtime"), strict=True):
            for length in dict.fromkeys(r["tokens"] for r in rows):
                for score in SCORES:
                    mine = [r for r in rows if r["tokens"] == length and r["score"] == score]
                    shares = [float(r["share of rows"]) for r in mine]
                    ax.plot(shares, [r[column] for r in mine], "o-", label=f"{score}, {length}")
            ax.plot([0, 1], [0, 1], "k:", label="rows alone")
            ax.set_xlabel("share of rows")
            ax.set_ylabel(f"time / all rows, {column}")
        axes[0].legend(fontsize=7)

    picture("query_rows", panels, panels=2)


if __name__ == "__main__":
    main()
