"""A sweep over all heads of a language model, in CPU time: against one run of the whole model for each head.

No exact sweep can do less than what follows each head.  With many tokens that is all that counts; with few, weights are read
once for several heads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from common import interleaved, let_transformers_import, one_thread, picture, publish

LAYERS, WIDTH, HEADS, KV_HEADS, INNER, WORDS = 30, 576, 9, 3, 1536, 49152  # SmolLM2-135M's
TOKENS = (16, 64, 256)
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--words", type=int, default=WORDS)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--swept", type=int, help="layers, evenly spaced, from which the others are extrapolated")
    parser.add_argument("--name", default="head_sweep", help="of the files in results")
    arguments = parser.parse_args()
    one_thread()
    rows = [row for tokens in arguments.tokens for row in measured(arguments, tokens)]
    title = (
        f"Sweeps over {arguments.layers} x {HEADS} heads, {arguments.sequences} sequences, CPU seconds, against one run of the "
        "model for each head; least: the share of its products with weights that follow a head"
    )
    publish(arguments.name, rows, title)
    picture(arguments.name, lambda _, axes: draw(axes, rows))


def least(layers: int, words: int) -> float:
    """The share of products with weights that follow the heads of a layer, the mean over layers."""
    out, mlp, head = WIDTH * WIDTH, 3 * WIDTH * INNER, WIDTH * words
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH * KV_HEADS // HEADS + mlp
    return (out + mlp + (layers - 1) / 2 * layer + head) / (layers * layer + head)


def measured(arguments: argparse.Namespace, tokens: int) -> Iterator[dict[str, Any]]:
    import torch

    import attnopt

    let_transformers_import()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    layers, words = arguments.layers, arguments.words
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, words, (2, arguments.sequences, tokens))
    clean, corrupted = ({"input_ids": x, "use_cache": False} for x in ids)

    def run() -> None:
        with torch.no_grad():
            model(**clean)

    def metric(output: Any) -> Any:
        return output.logits[0, -1, 0]

    swept = min(arguments.swept or layers, layers)
    chosen = [(2 * i + 1) * layers // (2 * swept) for i in range(swept)]
    sites = [site for i, site in enumerate(attnopt.inspect(model, kwargs=clean).sites) if i in chosen]
    naive = layers * HEADS * interleaved({"run": run}, ROUNDS, 1).median("run")
    capture = seconds(lambda: attnopt.inspect(model, kwargs=clean))  # what both sweeps do first
    sweeps = {
        "ablation": lambda: attnopt.head_importance(model, [clean], "ablation", sites=sites),
        "patch": lambda: attnopt.patch(model, clean, corrupted, metric=metric, sites=sites),
    }
    for name, sweep in sweeps.items():
        took = (seconds(sweep) - capture) * layers / swept
        yield {
            "tokens": tokens,
            "sweep": name,
            "layers swept": swept,
            "seconds": took,
            "naive": naive,
            "share": took / naive,
            "least": least(layers, words),
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
    axes.axhline(100 * rows[0]["least"], color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="% of one run for each head", ylim=0)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
