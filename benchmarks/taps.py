"""What collecting costs beside the model's own forward pass, by batch, and its memory over the number of batches."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import alone, let_transformers_import, memory, one_thread, picture, publish

import attnopt

WIDTH, HEADS, LAYERS, BATCH = 768, 12, 4, 4
LENGTHS = (128, 512, 1024)
ASKED: dict[str, dict[str, Any]] = {
    "outputs, mean": {"what": "outputs", "reduce": "mean"},
    "outputs, kept": {"what": "outputs"},
    "column means": {"what": "weights", "reduce": "column-mean"},
    "last row": {"what": "weights", "rows": [-1]},
    "contribution, mean": {"what": "contribution", "reduce": "mean"},
}
COUNTS = (4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", nargs=2, metavar=("ASKED", "BATCHES"), help="(used by the benchmark itself)")
    arguments = parser.parse_args()
    one_thread()
    if arguments.memory:
        print(json.dumps(_peak(arguments.memory[0], int(arguments.memory[1]))))
        return
    rows = [row for kind in ("BERT", "Llama") for length in LENGTHS for row in _times(kind, length, arguments.rounds)]
    title = (
        f"attnopt.collect: CPU time by batch over that of the model, {LAYERS} layers {WIDTH} wide, {BATCH} sequences"
    )
    publish("taps", rows, title)
    peaks = [row for asked in ("outputs, mean", "column means") for n in COUNTS for row in alone("--memory", asked, n)]
    publish(
        "taps_memory",
        peaks,
        f"attnopt.collect on n batches of {BATCH} x 256 tokens: peak over the memory before, MB",
        1,
    )
    picture("taps_memory", lambda _, axes: _draw(axes, peaks))


def _model(kind: str) -> torch.nn.Module:
    let_transformers_import()
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 1000, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH, "max_position_embeddings": 2048,
    }  # fmt: skip
    if kind == "BERT":
        return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).eval()
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=HEADS // 3, use_cache=False)
    return transformers.LlamaModel(config).eval()


def _batch(length: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 1000, (BATCH, length))}


def _times(kind: str, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A batch of ``collect`` lasts from one request for a batch to the next: the capture comes before the second one."""
    model, batch = _model(kind), _batch(length)

    def forward() -> float:
        start = time.process_time()
        with torch.no_grad():
            model(**batch)
        return time.process_time() - start

    for name, asked in ASKED.items():
        own: list[float] = []
        taken: list[float] = []
        stamps: list[float] = []

        def batches(own: list[float] = own, taken: list[float] = taken, stamps: list[float] = stamps) -> Iterator[Any]:
            for _ in range(rounds + 2):
                if stamps:
                    taken.append(time.process_time() - stamps[-1])
                own.append(forward())
                stamps.append(time.process_time())
                yield batch

        attnopt.collect(model, batches(), **asked)
        yield {
            "model": kind,
            "tokens": length,
            "asked": name,
            "forward, ms": 1e3 * median(own[1:]),
            "collect, ms": 1e3 * median(taken[1:]),
            "ratio": median(taken[1:]) / median(own[1:]),
            "wanted": {"outputs, mean": "1.10", "column means": "1.30"}.get(name, "-"),
        }


def _peak(asked: str, count: int) -> dict[str, Any]:
    model = _model("BERT")
    with torch.no_grad():
        model(**_batch(256))
    attnopt.collect(model, [_batch(256)], **ASKED[asked])  # imports what it needs
    start = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (proc(5))
    attnopt.collect(model, (_batch(256) for _ in range(count)), **ASKED[asked])
    return {"asked": asked, "batches": count, "peak": (memory("VmHWM") - start) / 1e6}


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    for asked in dict.fromkeys(row["asked"] for row in rows):
        own = [row for row in rows if row["asked"] == asked]
        axes.plot([row["batches"] for row in own], [row["peak"] for row in own], marker="o", label=asked)
    axes.set(xlabel="batches", ylabel="MB", title="peak over the memory before", ylim=0)
    axes.legend(frameon=False, fontsize=7)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
