"""Forms that make a map of all pairs, and what attnopt makes of them: memory and CPU time over the length.

Relative positions as rows of a table for each pair, or skewed by the model; phases and distances summed over features; a softmax
over queries.  Memory is
the peak of one call over that before it, each in a process of its own; a form that would need more than ``MOST`` is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import alone, interleaved, memory, one_thread, publish
from torch import Tensor, nn

import attnopt

HEADS, WIDTH = 4, 64  # of one head
LENGTHS = (512, 1024, 2048, 4096, 8192)
TIMED = 1024  # the longest that is timed of scores by pairs, where the model takes hundreds of times as long
MOST = 4e9  # bytes
EXAMPLE = 64  # the length that attnopt sees: at the longest, the model itself might not fit


class Pairs(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(4))
        self.longest, self.table = n, nn.Parameter(torch.randn(2 * n - 1, WIDTH) / 8)
        self.speed = nn.Parameter(torch.rand(WIDTH) / 100)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made: Tensor = self.out(((self.scores(q, k) / WIDTH**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError


class Looked(Pairs):
    """q (k + E[j - i])"""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[2]
        apart = torch.arange(n)[None, :] - torch.arange(n)[:, None] + self.longest - 1
        return q @ k.mT + torch.einsum("bhid,ijd->bhij", q, self.table[apart])


class Skewed(Pairs):
    """The same, as Music Transformer computes it."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[2]
        rows = self.table[self.longest - n : self.longest + n - 1]
        flat = F.pad(q @ rows.T, (0, 1)).flatten(2)
        return q @ k.mT + flat[..., n - 1 :][..., : n * (2 * n - 1)].unflatten(-1, (n, -1))[..., :n]


class Phases(Pairs):
    """ComplexFormer: amplitudes and phases, turned by the distance."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[2]
        at = torch.arange(n, dtype=q.dtype)
        apart = (at[:, None] - at[None, :])[..., None] * self.speed
        q, k = q[:, :, :, None], k[:, :, None]
        return (q.abs() * k.abs() * torch.cos(q.tanh() - k.tanh() + apart)).sum(-1)


class Distances(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q[:, :, :, None] - k[:, :, None]).square().sum(-1)


class Reversed(Pairs):
    """DependencyViT: each token divides its message among the others."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT / WIDTH**0.5).softmax(-1)
        made: Tensor = self.out((weights.mT @ v).transpose(1, 2).flatten(2))
        return made


KINDS = {kind.__name__.lower(): kind for kind in (Looked, Skewed, Phases, Distances, Reversed)}
_PER_PAIR = {
    "looked": 4 * WIDTH,
    "skewed": 13 * HEADS,
    "phases": 12 * HEADS * WIDTH,
    "distances": 8 * HEADS * WIDTH,
    "reversed": 12 * HEADS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--one", nargs=3, metavar=("KIND", "FORM", "LENGTH"), help="(used by the benchmark itself)")
    arguments = parser.parse_args()
    one_thread()
    if arguments.one:
        kind, form, n = arguments.one
        print(json.dumps({"peak": _peak(kind, form, int(n))}))
        return
    kinds = [arguments.only] if arguments.only else list(KINDS)
    rows = [_row(kind, n, arguments.rounds) for kind in kinds for n in LENGTHS if n <= arguments.longest]
    title = f"Maps of all pairs, {HEADS} heads of {WIDTH}, one sequence: peak memory in MB, and CPU time over that of the model"
    publish("pair_scores" if arguments.only is None else f"pair_scores_{arguments.only}", rows, title)


def _row(kind: str, n: int, rounds: int) -> dict[str, Any]:
    forms = ("model", "attnopt") if _fits(kind, n) else ("attnopt",)
    peaks = {form: _megabytes(kind, form, n) for form in forms}
    row: dict[str, Any] = {"scores": kind, "length": n, "model": peaks.get("model", "-"), "attnopt": peaks["attnopt"]}
    rivals = [rival for rival in (kind, "skewed") if _fits(rival, n) and (rival == kind or kind == "looked")]
    times = _ratios(kind, rivals, n, rounds) if rivals and (n <= TIMED or kind == "reversed") else {}
    row |= {"time": times.get(kind, "-"), "over skewed": times.get("skewed", "-") if kind == "looked" else "-"}
    print(row, file=sys.stderr, flush=True)
    return row


def _fits(kind: str, n: int) -> bool:
    return _PER_PAIR[kind] * n * n < MOST


def _megabytes(kind: str, form: str, n: int) -> float:
    (found,) = alone("--one", kind, form, n)
    return float(found["peak"]) / 1e6


def _made(kind: str, form: str, n: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = KINDS[kind](n).eval(), torch.randn(1, n, HEADS * WIDTH)
    if form == "model":
        return model, x
    length = torch.export.Dim("length", max=n)
    fast = attnopt.optimize(model, "fuse", (x[:, :EXAMPLE],), dynamic_shapes={"x": {1: length}})
    assert [s.status for s in fast.report.sites] == ["rewritten"]
    return fast, x


def _peak(kind: str, form: str, n: int) -> int:
    model, x = _made(kind, form, n)
    with torch.no_grad():
        model(x)
        start = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (proc(5))
        model(x)
    return memory("VmHWM") - start


def _ratios(kind: str, rivals: list[str], n: int, rounds: int) -> dict[str, float]:
    fast, x = _made(kind, "attnopt", n)
    calls = {"attnopt": partial(fast, x), **{rival: partial(_made(rival, "model", n)[0], x) for rival in rivals}}
    with torch.no_grad():
        times = interleaved(calls, rounds)
    return {rival: times.ratio("attnopt", rival) for rival in rivals}


if __name__ == "__main__":
    main()
