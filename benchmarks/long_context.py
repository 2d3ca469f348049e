"""SmolLM2-135M reads 4,096 and 8,192 tokens: the trained model against one whose layers see a window and a few sinks.

Time and memory of the whole prefill, and perplexity on news text, side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from common import alone, memory, one_thread, picture, publish
from smollm2 import Logits, news, trained

import attnopt
from attnopt.passes import LocalWindow

KEPT = (0, 1, 2, 29)  # layers that go on seeing everything
WINDOW, SINKS = 1024, 4


def text(length: int) -> torch.Tensor:
    """The first tokens [1, length] of the news."""
    assert len(news()) >= length
    return news()[None, :length]


def prepare(folder: str) -> None:
    """Saves the rewritten model; captured on few tokens, it costs what its windows keep at the length of the call."""
    one_thread()
    model = Logits(trained()).eval()
    layers = range(len(model.model.model.layers))
    narrow = {f"*layers.{n}.*": LocalWindow(WINDOW - 1, sinks=SINKS) for n in layers if n not in KEPT}
    tokens = {"input_ids": {1: torch.export.Dim.DYNAMIC}}
    attnopt.optimize(model, {"*": "fuse", **narrow}, (text(2048),), dynamic_shapes=tokens).save(folder)


def measure(length: int, folder: str, rounds: int) -> None:
    """In a process of its own, so that the peak of memory is the prefill's: prints what it measured as JSON."""
    one_thread()
    ids = text(length)
    model = attnopt.load(folder) if folder else Logits(trained()).eval()
    with torch.no_grad():
        seconds, logits = [], torch.empty(0)
        for _ in range(rounds):
            del logits
            start = time.process_time()
            logits = model(ids)
            seconds.append(time.process_time() - start)
        losses = [
            torch.nn.functional.cross_entropy(part, target, reduction="sum").item()
            for part, target in zip(logits[0, :-1].split(512), ids[0, 1:].split(512), strict=True)
        ]
    peak = memory("VmHWM") / 2**20
    perplexity = math.exp(sum(losses) / (length - 1))
    print(json.dumps({"s": statistics.median(seconds), "peak MiB": peak, "perplexity": perplexity}))


def rows(lengths: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        saved = f"{folder}/model"
        alone("--prepare", saved)
        variants = {"as trained": "", f"window {WINDOW} and {SINKS} sinks in all but {len(KEPT)} of 30 layers": saved}
        for length in lengths:
            for variant, source in variants.items():
                (row,) = alone("--measure", source, "--lengths", length, "--rounds", rounds)
                print(row, flush=True)
                yield {"tokens": length, "model": variant, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare)
        return
    if options.measure is not None:
        measure(options.lengths[0], options.measure, options.rounds)
        return
    one_thread()
    found = list(rows(options.lengths, options.rounds))
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
