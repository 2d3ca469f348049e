"""What fewer heads cost: a trained sentence encoder against its own dense outputs, and on tasks that people judged.

Calibrated on sentences of news, tested on film reviews, which are another domain; nothing is trained.  Every merge and every
importance is shown as it is and with the output projection fitted anew.  Needs what `attnopt demo` needs.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from common import one_thread, picture, publish

import attnopt
from attnopt import demo_similarity as similarity
from attnopt.passes import GroupedQuery, PruneHeads

TOKENS = 10_000
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def methods(fraction: float, kv_heads: int) -> Iterator[tuple[str, str, Any]]:
    """(what is left, the method's name, the pass)"""
    heads = f"{12 - round(12 * fraction)} of 12 heads"
    for importance in ("random", "weights", "output-norm", "wanda", "flap", "obs"):
        for compensate in ("none", "bias", "least-squares"):
            p = PruneHeads(fraction, importance=importance, compensate=compensate, budget="site")
            yield heads, f"{importance}, {compensate}", p
    yield heads, "default: one budget for all layers", PruneHeads(fraction)
    shared = f"12 -> {kv_heads} KV heads"
    for merge in ("first", "mean", "procrustes", "svd", "score-optimal"):
        for grouping in ("adjacent", "optimal"):
            for compensate in ("none", "least-squares"):
                p = GroupedQuery(kv_heads, merge, grouping, compensate, "site")
                yield shared, f"{merge}, {grouping}, {compensate}", p
    yield shared, "default: one budget for all layers", GroupedQuery(kv_heads)


def sentences(texts: Sequence[str]) -> list[str]:
    return [s.strip() + "." for text in texts for s in text.split(". ") if len(s) > 30]


def reviews() -> list[str]:
    file = similarity._folder("gensim") / "test" / "test_data" / "pang_lee_polarity.cor"
    return [line.split(" ", 1)[1] for line in file.read_text("latin-1").splitlines() if " " in line]


def batched(tokenizer: Any, texts: Sequence[str], size: int = 16) -> Batches:
    ordered = sorted(texts, key=len)
    return [similarity.tokens(tokenizer, ordered[i : i + size]) for i in range(0, len(ordered), size)]


def calibration(tokenizer: Any, texts: Sequence[str], seed: int) -> Batches:
    """Sentences in random order until there are enough tokens."""
    chosen, count = [], 0
    for text in random.Random(seed).sample(list(texts), len(texts)):
        chosen.append(text)
        count += len(tokenizer(text)["input_ids"])
        if count >= TOKENS:
            break
    return batched(tokenizer, chosen)


def embedded(model: torch.nn.Module, data: Batches) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return torch.cat([model(*batch) for batch in data]).numpy()


def agreement(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Mean cosine to the dense outputs, and Spearman's rho of all pairwise similarities."""
    from scipy.stats import spearmanr

    above = np.triu_indices(len(want), 1)
    rho = spearmanr((got @ got.T)[above], (want @ want.T)[above]).statistic
    return float((got * want).sum(1).mean()), float(rho)


def measured(chosen: Sequence[tuple[str, str, Any]], seeds: int) -> list[dict[str, Any]]:
    model, tokenizer = similarity.load_encoder()
    data = similarity.load_data()
    test, news = batched(tokenizer, reviews(), 32), sentences(data.background)
    dense = embedded(model, test)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": dict(axes), "attention_mask": dict(axes)}
    rows: list[dict[str, Any]] = [{"left": "all", "method": "original", "cosine": 1.0, "spearman": 1.0, "spread": 0.0,
                                   "seconds": 0.0, **tasks(model, tokenizer, data)}]  # fmt: skip
    for left, name, policy in chosen:
        found, seconds = [], []
        for seed in range(seeds):
            batches = calibration(tokenizer, news, seed)
            start = time.perf_counter()
            fast = attnopt.optimize(model, policy, batches[0], dynamic_shapes=shapes, calibration=batches)
            seconds.append(time.perf_counter() - start)
            found.append(agreement(embedded(fast, test), dense))
        cosines, rhos = zip(*found, strict=True)
        rows.append({
            "left": left, "method": name, "cosine": statistics.mean(cosines), "spearman": statistics.mean(rhos),
            "spread": max(cosines) - min(cosines), "seconds": statistics.mean(seconds),
            **tasks(fast, tokenizer, data),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def tasks(model: torch.nn.Module, tokenizer: Any, data: Any) -> dict[str, float]:
    def encode(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        with torch.no_grad():
            return model(ids, mask).numpy()

    return {name.partition(",")[0]: value for name, value in similarity.quality(encode, tokenizer, data).items()}


def draw(rows: Sequence[Mapping[str, Any]]) -> None:
    def paint(_: Any, axes: Any) -> None:
        shown = [r for r in rows if r["left"] != "all"]
        labels = [f"{r['left']}: {r['method']}" for r in shown]
        axes.barh(labels, [r["cosine"] for r in shown])
        axes.tick_params(axis="y", labelsize=4)
        axes.set(xlabel="cosine to the dense outputs")
        axes.invert_yaxis()

    picture("quality", paint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--defaults", action="store_true", help="only the default of each pass")
    arguments = parser.parse_args()
    one_thread()
    every = [m for fraction, kv_heads in ((0.5, 6), (0.75, 3)) for m in methods(fraction, kv_heads)]
    chosen = [m for m in every if not arguments.defaults or m[1].startswith("default")]
    rows = measured(chosen, arguments.seeds)
    publish("quality", rows, "Fewer heads without training: MiniLM against its own dense outputs")
    draw(rows)


if __name__ == "__main__":
    main()
