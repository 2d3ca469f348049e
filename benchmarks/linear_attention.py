"""Causal attention without a softmax, whose weights fade: tokens per second of CPU time, chunk by chunk, in torch and in ONNX
Runtime, and of the quadratic form that the model writes."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import interleaved, one_thread, picture, publish
from onnx_sessions import runner
from torch import Tensor, nn

import attnopt

HEADS, SIZE = 4, 64
_PAIRS = 8192  # tokens up to which the map of all pairs fits into memory


class Core(nn.Module):
    """The attention and its projections (arXiv:2401.04658)."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        places = torch.arange(x.shape[1])
        steps = (places[:, None] - places).clamp(min=0)
        fading = torch.exp(-self.slopes[:, None, None] * steps).tril()
        made: Tensor = self.out(((q @ k.mT * fading) @ v).transpose(1, 2).flatten(2))
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    arguments = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    rows = list(measured(arguments.lengths, arguments.rounds))
    publish("linear_attention", rows, "Attention without a softmax: thousands of tokens per second of CPU time", 1)
    draw(rows)


def measured(lengths: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    model = Core().eval()
    fast = attnopt.optimize(
        model, "fuse", (torch.randn(1, 512, HEADS * SIZE),), dynamic_shapes={"x": {1: torch.export.Dim.AUTO}}
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        fast.export_onnx(path := Path(folder) / "m.onnx")
        for length in lengths:
            x = torch.randn(1, length, HEADS * SIZE)
            calls: dict[str, Callable[[], object]] = {"chunks": lambda x=x: fast(x), "onnx": runner(path, (x,))}
            if length <= _PAIRS:
                calls["pairs"] = lambda x=x: model(x)
            times = interleaved(calls, rounds, 1)
            told = {name: length / times.median(name) / 1e3 for name in calls}
            yield {
                "tokens": length,
                "chunks": told["chunks"],
                "chunks, ONNX Runtime": told["onnx"],
                "all pairs": told.get("pairs", "-"),
            }


def draw(rows: list[dict[str, Any]]) -> None:
    def panel(_: Any, ax: Any) -> None:
        for column in list(rows[0])[1:]:
            known = [r for r in rows if r[column] != "-"]
            ax.plot([r["tokens"] for r in known], [r[column] for r in known], "o-", label=column)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("tokens")
        ax.set_ylabel("thousands of tokens per second")
        ax.legend(fontsize=7)

    picture("linear_attention", panel)


if __name__ == "__main__":
    main()
