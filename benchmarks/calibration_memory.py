"""Memory of calibrating and rewriting a language model, over its depth: that of one layer, and of the new weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import alone, let_transformers_import, memory, one_thread, picture, publish

LAYERS = (2, 4, 8, 16)
POLICIES = ("fuse", "prune-heads(fraction=0.25)", "grouped-query(kv_heads=1)")
WIDTH, HEADS, KV_HEADS, BATCHES, TOKENS = 576, 9, 3, 4, 256  # SmolLM2-135M's layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("POLICY", "LAYERS"), help="(used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measured(arguments.one[0], int(arguments.one[1]))))
        return
    one_thread()
    rows = [row for policy in POLICIES for layers in LAYERS for row in alone("--one", policy, layers)]
    publish(
        "calibration_memory",
        rows,
        f"attnopt.optimize, calibrated on {BATCHES} x {TOKENS} tokens: memory over that before, MB, Llama {WIDTH} wide",
        digits=1,
    )
    picture("calibration_memory", lambda _, axes: _draw(axes, rows))


def _measured(policy: str, layers: int) -> dict[str, Any]:
    import torch
    from torch import nn

    import attnopt

    let_transformers_import()
    from transformers import LlamaConfig, LlamaModel

    one_thread()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    model = LlamaModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 1000, (1, TOKENS)), "use_cache": False} for _ in range(BATCHES)]
    with torch.no_grad():
        model(**batches[0])
    attnopt.inspect(nn.TransformerEncoderLayer(8, 2).eval(), (torch.zeros(2, 3, 8),))  # imports what it needs
    start = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (proc(5))
    made = attnopt.optimize(model, policy, (), batches[0], calibration=batches)
    peak = memory("VmHWM")
    assert all(s.passes for s in made.report.sites)
    known = {p.data_ptr() for p in model.parameters()}
    return {
        "policy": policy,
        "layers": layers,
        "weights": _megabytes(list(model.parameters())),
        "new weights": _megabytes([p for p in made.parameters() if p.data_ptr() not in known]),
        "peak": (peak - start) / 1e6,
    }


def _megabytes(tensors: list[Any]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors)) / 1e6


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    for policy in POLICIES:
        own = [row for row in rows if row["policy"] == policy]
        axes.plot([row["layers"] for row in own], [row["peak"] for row in own], marker="o", label=policy)
    own = [row for row in rows if row["policy"] == POLICIES[0]]
    weights = [row["weights"] for row in own]
    axes.plot([row["layers"] for row in own], weights, color="black", linewidth=0.8, label="the model's weights")
    axes.set(xlabel="layers", ylabel="MB", title="peak over the memory before", ylim=0, xticks=LAYERS)
    axes.legend(frameon=False, fontsize=7)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
