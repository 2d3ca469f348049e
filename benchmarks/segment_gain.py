"""Gains on the attention that segments of keys get: time against the same attention without gains, and against the map
edited by hand; memory of both as the sequence grows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import alone, interleaved, memory, one_thread, picture, publish
from torch import Tensor, nn

import attnopt
from attnopt.passes import SegmentGain

WIDTH, HEADS = 768, 12
IMAGE, SINKS = (
    range(35, 611),
    (0, 40, 300),
)  # 576 tokens of a picture after a prompt; the first token and two of the picture
CASES: dict[str, SegmentGain] = {
    "emphasis": SegmentGain(IMAGE, 1.5),
    "sinks redistributed": SegmentGain(
        SINKS, 0.6, normalise="redistribute", to=IMAGE, when={"mass": 0.2, "share": 0.5}
    ),
    "not renormalised": SegmentGain(IMAGE, 0.5, normalise="none"),
}


class Attention(nn.Module):
    """``change``: of the map, which then exists."""

    def __init__(self, is_causal: bool, change: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.is_causal, self.change = is_causal, change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.change is None:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        else:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            if self.is_causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
            mixed = self.change(scores.softmax(-1)) @ v
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made


def by_hand(case: str) -> Callable[[Tensor], Tensor]:
    """The same on a map [B, H, L, S], as a user would write it."""

    def change(p: Tensor) -> Tensor:
        place = torch.arange(p.shape[-1])
        image = (place >= IMAGE.start) & (place < IMAGE.stop)
        if case == "emphasis":
            scaled = p * torch.where(image, 1.5, 1.0)
            return scaled / scaled.sum(-1, keepdim=True)
        if case == "not renormalised":
            return p * torch.where(image, 0.5, 1.0)
        sinks = torch.isin(place, torch.tensor(SINKS))
        of_sinks, of_image = ((p * m).sum(-1, keepdim=True) for m in (sinks, image & ~sinks))
        both = of_sinks + of_image
        is_on = (both >= 0.2) & (of_sinks <= 0.5 * both) & (of_image > 0)
        moved = torch.where(sinks, 0.6 * p, torch.where(image, p * (1 + 0.4 * of_sinks / of_image), p))
        return torch.where(is_on, moved, p)

    return change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "LENGTH"))
    arguments = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    if arguments.peak:
        name, length = arguments.peak
        print(json.dumps({"MB": peak(name, int(length))}))
        return
    rows = [row for length in arguments.lengths for row in measured(length, arguments.rounds)]
    publish(
        "segment_gain", rows, "Gains on segments of keys: CPU time against the same attention, fused, without gains"
    )
    grown = [
        {"length": n, "gains, MB": alone("--peak", "gains", n)[0]["MB"], "map, MB": alone("--peak", "map", n)[0]["MB"]}
        for n in (1024, 2048, 4096)
    ]
    publish("segment_gain_memory", grown, "Gains on segments of keys: the most memory that one call takes", digits=0)
    draw(rows, grown)


def measured(length: int, rounds: int) -> Iterator[dict[str, Any]]:
    x = torch.randn(1, length, WIDTH)
    for is_causal in (True, False):
        model = Attention(is_causal).eval()
        modules: dict[str, nn.Module] = {"fused": attnopt.optimize(model, "fuse", (x,), backend="blocked")}
        for case, p in CASES.items():
            edited = Attention(is_causal, by_hand(case)).eval()
            edited.load_state_dict(model.state_dict())
            modules |= {case: attnopt.optimize(model, p, (x,), backend="blocked"), f"{case}, map": edited}
        with torch.no_grad():
            times = interleaved({name: lambda m=m: m(x) for name, m in modules.items()}, rounds, 1)
        for case in CASES:
            yield {
                "length": length,
                "causal": is_causal,
                "gains": case,
                "time / fused": times.ratio(case, "fused"),
                "map / fused": times.ratio(f"{case}, map", "fused"),
            }


def peak(name: str, length: int) -> float:
    """MB that one call adds to the process at most."""
    case, x = "sinks redistributed", torch.randn(1, length, WIDTH)
    model = Attention(True, by_hand(case) if name == "map" else None).eval()
    module = model if name == "map" else attnopt.optimize(model, CASES[case], (x[:, :640],), dynamic_shapes="auto")
    with torch.no_grad():
        module(x[:, :640])
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (proc(5))
        module(x)
    return (memory("VmHWM") - before) / 1e6


def draw(rows: list[dict[str, Any]], grown: list[dict[str, Any]]) -> None:
    def panels(_: Any, axes: Any) -> None:
        longest = [r for r in rows if r["length"] == rows[-1]["length"]]
        names = [f"{r['gains']}, {'causal' if r['causal'] else 'full'}" for r in longest]
        axes[0].barh(names, [r["time / fused"] for r in longest])
        axes[0].set_xlabel("time / the same attention without gains")
        for key in ("gains, MB", "map, MB"):
            axes[1].plot([g["length"] for g in grown], [g[key] for g in grown], "o-", label=key)
        axes[1].set_xlabel("tokens")
        axes[1].legend()

    picture("segment_gain", panels, panels=2)


if __name__ == "__main__":
    main()
