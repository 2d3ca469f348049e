"""A sweep over all heads of a language model, in CPU time: against one run of the whole model for each head."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from common import interleaved, let_transformers_import, one_thread, picture, publish

LAYERS, WIDTH, HEADS, KV_HEADS = 30, 576, 9, 3  # SmolLM2-135M's
TOKENS = (16, 64, 256)
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    one_thread()
    rows = [row for tokens in arguments.tokens for row in measured(arguments.layers, tokens)]
    publish(
        "head_sweep",
        rows,
        f"Sweeps over {arguments.layers} x {HEADS} heads, CPU seconds, against one run of the model for each head",
    )
    picture("head_sweep", lambda _, axes: draw(axes, rows))


def measured(layers: int, tokens: int) -> Iterator[dict[str, Any]]:
    import torch

    import attnopt

    let_transformers_import()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    model = LlamaForCausalLM(config).eval()
    clean, corrupted = ({"input_ids": torch.randint(0, 1000, (1, tokens)), "use_cache": False} for _ in range(2))

    def run() -> None:
        with torch.no_grad():
            model(**clean)

    def metric(output: Any) -> Any:
        return output.logits[0, -1, 0]

    def prepared() -> None:  # what both sweeps do first
        attnopt.inspect(model, kwargs=clean)

    naive = layers * HEADS * interleaved({"run": run}, ROUNDS, 1).median("run")
    capture = seconds(prepared)
    sweeps = {
        "ablation": lambda: attnopt.head_importance(model, [clean], "ablation"),
        "patch": lambda: attnopt.patch(model, clean, corrupted, metric=metric),
    }
    for name, sweep in sweeps.items():
        took = seconds(sweep) - capture
        yield {
            "tokens": tokens,
            "sweep": name,
            "seconds": took,
            "naive": naive,
            "share": took / naive,
            "capture": capture,
        }


def seconds(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["sweep"] for row in rows):
        own = [row for row in rows if row["sweep"] == name]
        axes.plot([row["tokens"] for row in own], [100 * row["share"] for row in own], marker="o", label=name)
    axes.axhline(25, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="% of one run for each head", ylim=0)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
