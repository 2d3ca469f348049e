"""Memory of one process that optimizes a model again and again, 200 times.

Wanted: no tensor and no module more with every round.  What remains is the source of the graphs' generated code, which
torch.fx keeps for good for tracebacks, as it does after ``torch.export.export`` alone: some 0.1 MB for a small model.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

from common import memory, one_thread, picture, publish

EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    one_thread()
    rows = _measured(arguments.rounds)
    publish("leak", rows, f"Resident memory over {arguments.rounds} optimizations in one process")
    picture("leak", lambda figure, axes: _draw(axes, rows))


def _measured(rounds: int) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    import attnopt

    policies = ["fuse", "local-window(left=4)", "prune-heads(heads=[0])", "grouped-query(kv_heads=2)"]
    rows: list[dict[str, Any]] = []
    for n in range(rounds):
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        x = torch.randn(2, 32, 64)
        attnopt.optimize(model, policies[n % len(policies)], (x,))(x)
        if (n + 1) % EVERY == 0:
            gc.collect()
            rows.append({"optimizations": n + 1, "resident, MB": memory("VmRSS") / 1e6, "live tensors": _tensors()})
    return rows


def _tensors() -> int:
    import torch

    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.plot([row["optimizations"] for row in rows], [row["resident, MB"] for row in rows], marker=".")
    axes.set(xlabel="optimizations in one process", ylabel="MB", title="resident memory", ylim=0)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
