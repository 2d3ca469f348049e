"""Edits of attention maps, of keys and of what heads give: CPU time and memory against the same edit of a map, made by hand in
the model, and against the same attention without an edit.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import alone, interleaved, memory, one_thread, picture, publish
from torch import Tensor, nn

import attnopt
from attnopt.passes import AddValues, ExtendKeys, MixMap, PoolKeys, RouteHeads, SoftPAG, Steer

WIDTH, HEADS, SIZE = 768, 12, 64
POOL, OTHERS = 4, 256  # tokens of a pool, tokens of a reference
EVERY = range(HEADS)


@dataclass(frozen=True)
class Case:
    """``policy`` for a length; by hand, ``keys`` changes keys and values [B, H, S, D], ``change`` the map, and ``heads`` the
    outputs of heads [B, H, L, D]."""

    policy: Callable[[int], Any]
    keys: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda k, v: (k, v)
    change: Callable[[Tensor], Tensor] = lambda p: p
    heads: Callable[[Tensor], Tensor] = lambda o: o
    calibrates: bool = False


class Attention(nn.Module):
    """``case``: the edit by hand, on a map; without one, the model that attnopt is given."""

    def __init__(self, case: Case | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.case is None:
            o = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            k, v = self.case.keys(k, v)
            o = self.case.heads(self.case.change((q @ k.mT / math.sqrt(SIZE)).softmax(-1)) @ v)
        made: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return made


def shifted(o: Tensor) -> Tensor:
    o = o.clone()
    o[:, [2, 5]] += 0.1
    return o


def near(length: int) -> Tensor:
    place = torch.arange(length)
    return (-(place[:, None] - place).abs() / 8.0).softmax(-1)


def pooled(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Every token has the mean of its pool: the map has all keys."""
    k, v = (x.unflatten(2, (-1, POOL)).mean(3).repeat_interleave(POOL, 2) for x in (k, v))
    return k, v


def added(p: Tensor) -> Tensor:
    p = p.clone()
    p[..., :16] += 0.1
    return p


def extended(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As long as with a reference; which tokens these are costs the same."""
    k, v = (torch.cat([x, x[:, :, :OTHERS]], 2) for x in (k, v))
    return k, v


def routed(o: Tensor) -> Tensor:
    """A gate for each head and token, as a router by norms would give."""
    scores = o.norm(dim=-1)
    return o * (scores >= scores.topk(3, 1).values[:, -1:]).unsqueeze(-1) * scores.softmax(1).unsqueeze(-1)


CASES = {
    "steer": Case(lambda n: Steer(0.1 * torch.ones(SIZE), heads=[2, 5]), heads=shifted),
    "add values of 16 tokens": Case(lambda n: AddValues(range(16), 0.1), change=added),
    "soft-PAG": Case(
        lambda n: SoftPAG(heads=list(EVERY), u=0.5), change=lambda p: 0.5 * p + 0.5 * torch.eye(p.shape[-1])
    ),
    "mix a map": Case(lambda n: MixMap(near(n), 0.5), change=lambda p: 0.5 * p + 0.5 * near(p.shape[-1])),
    f"pools of {POOL} keys": Case(lambda n: PoolKeys(POOL), keys=pooled),
    f"a reference of {OTHERS} tokens": Case(lambda n: ExtendKeys(torch.randn(OTHERS, WIDTH)), keys=extended),
    "3 of 12 heads, soft": Case(
        lambda n: RouteHeads(shared=1, routed=2, router="linear", weights="soft"), heads=routed, calibrates=True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--peak", nargs=3, metavar=("CASE", "FORM", "LENGTH"))
    arguments = parser.parse_args()
    one_thread()
    if arguments.peak:
        case, form, length = arguments.peak
        print(json.dumps({"MB": peak(case, form == "map", int(length))}))
        return
    rows = [row for length in arguments.lengths for row in measured(length, arguments.rounds)]
    title = "Edits of maps, keys and head outputs: CPU time against the same attention without an edit, fused"
    publish("edits", rows, title)
    publish("guidance", list(guided(arguments.rounds)), "Guidance: CPU time against the model alone, fused")
    draw(rows)


def measured(length: int, rounds: int) -> Iterator[dict[str, Any]]:
    x = torch.randn(1, length, WIDTH)
    for name, case in CASES.items():
        modules: dict[str, nn.Module] = {
            "fused": attnopt.optimize(Attention().eval(), "fuse", (x,)),
            "edited": optimized(case, x),
            "map": Attention(case).eval(),
        }
        with torch.no_grad():
            times = interleaved({name: lambda m=m: m(x) for name, m in modules.items()}, rounds, 1)
        yield {
            "edit": name,
            "length": length,
            "time / fused": times.ratio("edited", "fused"),
            "map / fused": times.ratio("map", "fused"),
            "MB": alone("--peak", name, "edited", length)[0]["MB"],
            "map, MB": alone("--peak", name, "map", length)[0]["MB"],
        }


def optimized(case: Case, x: Tensor) -> attnopt.OptimizedModel:
    batches = -(-2 * WIDTH // x.shape[1])  # more tokens than features of the queries
    calibration = [torch.randn_like(x) for _ in range(batches)] if case.calibrates else None
    return attnopt.optimize(Attention().eval(), case.policy(x.shape[1]), (x,), calibration=calibration)


def guided(rounds: int, layers: int = 6, length: int = 1024) -> Iterator[dict[str, Any]]:
    """Both branches as one module, against two runs of two models."""
    x, model = torch.randn(1, length, WIDTH), nn.Sequential(*(Attention() for _ in range(layers))).eval()
    strong = attnopt.optimize(model, "fuse", (x,))
    for first in (0, layers // 2, layers - 1):
        policy = {f"{first}": SoftPAG(heads=[0, 3], u=0.5)}
        weak = attnopt.optimize(model, policy, (x,))
        both = attnopt.guidance(model, policy, (x,), scale=2.0)
        calls = {
            "alone": lambda: strong(x),
            "both": lambda both=both: both(x),
            "two runs": lambda weak=weak: 3.0 * strong(x) - 2.0 * weak(x),
        }
        with torch.no_grad():
            times = interleaved(calls, rounds, 1)
        yield {
            "layers": layers,
            "first edited": first,
            "both / alone": times.ratio("both", "alone"),
            "two runs / alone": times.ratio("two runs", "alone"),
        }


def peak(name: str, on_map: bool, length: int) -> float:
    """MB that one call adds to the process at most."""
    case, x = CASES[name], torch.randn(1, length, WIDTH)
    module = Attention(case).eval() if on_map else optimized(case, x)
    with torch.no_grad():
        module(x)
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used again
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (proc(5))
        module(x)
    return (memory("VmHWM") - before) / 1e6


def draw(rows: list[dict[str, Any]]) -> None:
    def panels(_: Any, axes: Any) -> None:
        longest = [r for r in rows if r["length"] == rows[-1]["length"]]
        for ax, columns, what in zip(
            axes, (("time / fused", "map / fused"), ("MB", "map, MB")), ("time / fused", "MB"), strict=True
        ):
            for i, column in enumerate(columns):
                ax.barh([n + 0.4 * i for n in range(len(longest))], [r[column] for r in longest], 0.4, label=column)
            ax.set_yticks(range(len(longest)), [r["edit"] for r in longest])
            ax.set_xlabel(f"{what}, {longest[0]['length']} tokens")
            ax.legend()

    picture("edits", panels, panels=2)


if __name__ == "__main__":
    main()
