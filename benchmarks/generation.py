"""SmolLM2-135M generates with `generate()`: the trained model against a window and a few sinks in a rolling cache.

Memory of the process, size of the cache and time for each token, along the way.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from typing import Any

import torch
from common import alone, memory, one_thread, picture, publish
from long_context import text
from smollm2 import trained
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import attnopt
from attnopt.patterns import Causal, Sinks, Window

WINDOW, SINKS, PROMPT, EVERY = 1024, 4, 512, 250
VARIANTS = {"full": "as trained", "rolling": f"window {WINDOW} and {SINKS} sinks in all 30 layers"}


class Probe(BaseStreamer):
    """Called by `generate()` with each token: every so often notes where time and memory stand."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.count, self.rows = cache, 0, list[dict[str, float]]()
        self.start = time.process_time()

    def put(self, value: torch.Tensor) -> None:
        self.count += value.numel()
        if self.count % EVERY:
            return
        held = sum(t.untyped_storage().nbytes() for layer in self.cache.layers for t in (layer.keys, layer.values))
        now = time.process_time()
        row = {
            "tokens": self.count,
            "resident MiB": memory("VmRSS") / 2**20,
            "cache MiB": held / 2**20,
            "s": now - self.start,
        }
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def end(self) -> None:
        pass


def measure(variant: str, tokens: int) -> None:
    """In a process of its own; prints a line of JSON every so many tokens."""
    one_thread()
    torch.manual_seed(0)
    model = trained()
    if variant == "rolling":
        pattern = Causal() & (Window(WINDOW - 1, 0) | Sinks(SINKS))
        attnopt.apply_patterns(model, {f"model.layers.{n}.self_attn": pattern for n in range(30)})
    cache = DynamicCache(config=model.config)
    prompt = text(PROMPT)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens - PROMPT,
        min_new_tokens=tokens - PROMPT,
        do_sample=True,
        past_key_values=cache,
        streamer=Probe(cache),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000, help="with the rolling cache")
    parser.add_argument("--full", type=int, default=3_000, help="with the full cache")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.tokens)
        return
    one_thread()
    lengths = {"full": options.full, "rolling": options.tokens}
    found = {variant: alone("--measure", variant, "--tokens", tokens) for variant, tokens in lengths.items()}
    publish("generation", table(found), f"SmolLM2-135M, `generate()` on one thread after {PROMPT} tokens of news")
    picture("generation", lambda figure, axes: draw(axes, found), panels=3)


def table(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Where the tokens have doubled, and at the end of each run."""
    picked: list[dict[str, Any]] = []
    for variant, line in found.items():
        chosen = [r for r in line if r["tokens"] in (1000, 2000, 4000, 8000, 16000) or r is line[-1]]
        for row in chosen:
            before = next((r for r in reversed(line) if r["tokens"] <= row["tokens"] - 500), line[0])
            pace = (row["s"] - before["s"]) / max(1, row["tokens"] - before["tokens"])
            picked.append(
                {
                    "model": VARIANTS[variant],
                    "tokens": int(row["tokens"]),
                    "cache MiB": row["cache MiB"],
                    "resident MiB": row["resident MiB"],
                    "ms a token": 1000 * pace,
                }
            )
    return picked


def draw(axes: Any, found: dict[str, list[dict[str, float]]]) -> None:
    for variant, line in found.items():
        tokens = [row["tokens"] for row in line]
        for axis, column in zip(axes, ("cache MiB", "resident MiB"), strict=False):
            axis.plot(tokens, [row[column] for row in line], label=VARIANTS[variant])
            axis.set(xlabel="tokens", ylabel=column)
        steps = list(pairwise(line))
        pace = [1000 * (b["s"] - a["s"]) / (b["tokens"] - a["tokens"]) for a, b in steps]
        axes[2].plot(tokens[1:], pace, label=VARIANTS[variant])
        axes[2].set(xlabel="tokens", ylabel="ms a token")
    for axis in axes:
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize="small")


if __name__ == "__main__":
    main()
