"""What the benchmarks share: CPU time of calls that take turns, and results as a table, JSON and a picture."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Times:
    """Seconds of CPU time of each round, by the name of the call."""

    of: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        return statistics.median(self.of[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of one call's time relative to another's in the same round."""
        return statistics.median(a / b for a, b in zip(self.of[name], self.of[base], strict=True))

    def spread(self, name: str, base: str) -> tuple[float, float]:
        """Quartiles of the same ratios."""
        low, _, high = statistics.quantiles((a / b for a, b in zip(self.of[name], self.of[base], strict=True)), n=4)
        return low, high


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> Times:
    """Every round runs each call once, in turning order, so that a busy machine is unkind to all of them alike.

    What one call left to the garbage collector is not counted as the next one's work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds + warm_up):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.collect()
            start = time.process_time()
            calls[name]()
            if i >= warm_up:
                seconds[name].append(time.process_time() - start)
    return Times({name: tuple(found) for name, found in seconds.items()})


def one_thread() -> None:
    """With several threads, CPU time would count waiting as work."""
    torch.set_num_threads(1)


def let_transformers_import() -> None:
    """torchvision's wheel is a CUDA build: beside CPU torch its import fails in two operators that are not there."""
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            return


def machine() -> dict[str, Any]:
    import attnopt

    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attnopt": attnopt.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def publish(name: str, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print ``rows`` as a table, and write them with the machine's description to ``results/``."""
    RESULTS.mkdir(exist_ok=True)
    table = _markdown(rows)
    about = machine()
    described = f"{about['cpu']}, {about['threads']} thread, torch {about['torch']}, {about['date']}"
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{described}\n\n{table}\n", encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": about, "rows": list(rows)}, indent=2), encoding="utf-8"
    )
    print(f"{title}\n{described}\n\n{table}\n", flush=True)


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    head = list(rows[0])
    cells = [head, *([_cell(row[column]) for column in head] for row in rows)]
    width = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, width, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def picture(name: str, draw: Callable[[Any, Any], None], panels: int = 1) -> None:
    """``draw(figure, axes)`` into ``results/name.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 3.6), layout="constrained")
    draw(figure, axes)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)
