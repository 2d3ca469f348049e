"""``attnopt.inspect`` on models of 12 to 96 layers, 8,192 wide, on the meta device: no weights in memory.

Wanted: 96 layers in less than two minutes, growing linearly with the layers.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from common import alone, let_transformers_import, memory, one_thread, picture, publish

LAYERS = (12, 24, 48, 96)
WIDTH, HEADS, KV_HEADS, TOKENS = 8192, 64, 8, 128
MODELS = ("encoder", "llama")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "LAYERS"), help="(used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measured(arguments.one[0], int(arguments.one[1]))))
        return
    one_thread()
    rows = [row for model in MODELS for layers in LAYERS for row in alone("--one", model, layers)]
    publish("scale", rows, f"attnopt.inspect on the meta device, {WIDTH:,} wide, {HEADS} heads, 1 x {TOKENS} tokens")
    picture("scale", lambda figure, axes: _draw(axes, rows), panels=2)


def _encoder(layers: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), (torch.empty(1, TOKENS, WIDTH),), {}


def _llama(layers: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    let_transformers_import()
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=28672,
        num_hidden_layers=layers,
    )
    return LlamaModel(config), (), {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long), "use_cache": False}


def _measured(name: str, layers: int) -> dict[str, Any]:
    import torch

    import attnopt

    one_thread()
    with torch.device("meta"):
        model, args, kwargs = {"encoder": _encoder, "llama": _llama}[name](layers)
    attnopt.inspect(torch.nn.TransformerEncoderLayer(8, 2).eval(), (torch.zeros(2, 3, 8),))  # imports what it needs
    start = time.process_time()
    found = attnopt.inspect(model.eval(), args, kwargs)
    seconds = time.process_time() - start
    assert len(found.sites) == layers, str(found)
    return {
        "model": name,
        "layers": layers,
        "parameters, billions": sum(p.numel() for p in model.parameters()) / 1e9,
        "inspect, CPU s": seconds,
        "a layer, CPU s": seconds / layers,
        "peak of the process, MB": round(memory("VmHWM") / 1e6),
    }


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    seconds, memory = axes
    for name in MODELS:
        own = [row for row in rows if row["model"] == name]
        layers = [row["layers"] for row in own]
        seconds.plot(layers, [row["inspect, CPU s"] for row in own], marker="o", label=name)
        memory.plot(layers, [row["peak of the process, MB"] for row in own], marker="o", label=name)
    seconds.set(xlabel="layers", ylabel="CPU seconds", title="inspect", ylim=0, xticks=LAYERS)
    memory.set(xlabel="layers", ylabel="MB", title="peak memory of the process", ylim=0, xticks=LAYERS)
    for panel in axes:
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)


if __name__ == "__main__":
    main()
