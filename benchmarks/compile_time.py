"""``attnopt.optimize(model, "fuse")`` against ``torch.export.export`` alone: BERT-base of 6, 12 and 24 layers.

Wanted: less than 4x the time of the export, growing linearly with the layers; peak memory at most that of the export
plus twice the weights.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from common import alone, interleaved, let_transformers_import, memory, one_thread, picture, publish

LAYERS = (6, 12, 24)
STAGES = ("capture", "match", "rewrite", "lower", "verify")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=("export", "optimize"), help="(used by the benchmark itself)")
    parser.add_argument("--layers", type=int, default=12, help="(used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(_peak(arguments.memory_of, arguments.layers)))
        return
    rows = [_measured(layers, arguments.rounds) for layers in LAYERS]
    publish("compile_time", rows, "optimize(model, 'fuse') against torch.export alone, BERT-base, 1 x 128 tokens")
    picture("compile_time", lambda figure, axes: _draw(axes, rows), panels=2)


def _model(layers: int) -> tuple[Any, dict[str, Any]]:
    import torch

    let_transformers_import()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()
    return model, {
        "input_ids": torch.randint(0, 30000, (1, 128)),
        "attention_mask": torch.ones(1, 128, dtype=torch.long),
    }


def _export(model: Any, kwargs: dict[str, Any]) -> None:
    import torch

    torch.export.export(model, (), kwargs)


def _optimize(model: Any, kwargs: dict[str, Any]) -> Any:
    import attnopt

    fast = attnopt.optimize(model, "fuse", (), kwargs)
    assert len(fast.report.sites) == fast.report.count("rewritten") > 0, str(fast.report)
    return fast.report.seconds


def _measured(layers: int, rounds: int) -> dict[str, Any]:
    one_thread()
    model, kwargs = _model(layers)
    stages: list[dict[str, float]] = []
    times = interleaved(
        {"export": lambda: _export(model, kwargs), "optimize": lambda: stages.append(_optimize(model, kwargs))}, rounds
    )
    total = sum(sum(one.values()) for one in stages)
    share = {stage: sum(one.get(stage, 0.0) for one in stages) / total for stage in STAGES}
    peak: dict[str, Any] = {}
    for what in ("export", "optimize"):
        peak.update(*alone("--memory-of", what, "--layers", layers))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "layers": layers,
        "export, s": times.median("export"),
        "optimize, s": times.median("optimize"),
        "ratio": times.ratio("optimize", "export"),
        **{f"{stage}, %": round(100 * share[stage]) for stage in STAGES},
        "weights, MB": round(weights / 1e6),
        "peak of export, MB": round(peak["export"] / 1e6),
        "peak of optimize, MB": round(peak["optimize"] / 1e6),
        "beyond export, x weights": (peak["optimize"] - peak["export"]) / weights,
    }


def _peak(what: str, layers: int) -> dict[str, int]:
    one_thread()
    model, kwargs = _model(layers)
    {"export": _export, "optimize": _optimize}[what](model, kwargs)
    return {what: memory("VmHWM")}


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    time, memory = axes
    layers = [row["layers"] for row in rows]
    for name in ("optimize", "export"):
        time.plot(layers, [row[f"{name}, s"] for row in rows], marker="o", label=name)
        memory.plot(layers, [row[f"peak of {name}, MB"] for row in rows], marker="o", label=name)
    memory.plot(layers, [row["weights, MB"] for row in rows], marker="o", linestyle=":", label="weights")
    time.set(xlabel="layers", ylabel="CPU seconds", title="time", ylim=0, xticks=layers)
    memory.set(xlabel="layers", ylabel="MB", title="peak memory", ylim=0, xticks=layers)
    for panel in axes:
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)


if __name__ == "__main__":
    main()
