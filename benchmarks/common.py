"""What the benchmarks share: CPU time of calls that take turns, processes of their own, and results as tables and pictures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peak import peak_rates

from attnopt.base.cpu_timing import Times, interleaved
from attnopt.base.processor import processor
from attnopt.cli.demo_data import let_transformers_import

__all__ = [
    "RESULTS",
    "Times",
    "alone",
    "interleaved",
    "let_transformers_import",
    "machine",
    "memory",
    "one_thread",
    "options",
    "package",
    "picture",
    "publish",
]

RESULTS = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results")


def one_thread() -> None:
    """With several threads, CPU time would count waiting as work."""
    torch.set_num_threads(1)


def options(description: str | None, rounds: int, what: str = "models") -> argparse.Namespace:
    """What a benchmark of several subjects is told: ``rounds`` and ``only``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", default="", help=f"{what} whose names contain this")
    return parser.parse_args()


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f"{name} is not installed; run the benchmark as `make bench` does")
    return Path(found.origin).parent


def alone(*options: object) -> list[dict[str, Any]]:
    """What this benchmark prints as lines of JSON when it is started again with ``options``: memory is of a whole process."""
    command = [sys.executable, sys.argv[0], *map(str, options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def memory(name: str) -> int:
    """Bytes of this process: ``VmRSS``, resident now; ``VmHWM``, the most that was (proc(5)).

    ``ru_maxrss`` would start from that of the process that started this one."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    import attnopt

    return {
        "cpu": processor(),
        "peak, GFLOP/s": {form.name.lower(): round(rate / 1e9) for form, rate in peak_rates().items()},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attnopt": attnopt.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def publish(name: str, rows: Sequence[Mapping[str, Any]], title: str, digits: int = 2) -> None:
    """Print ``rows`` as a table, and write them with the machine's description to ``results/``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    table = _markdown(rows, digits)
    about = machine()
    peaks = ", ".join(f"{rate} GFLOP/s ({form})" for form, rate in about["peak, GFLOP/s"].items())
    threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"
    described = f"{about['cpu']}, peak of a core {peaks}, {threads}, torch {about['torch']}, {about['date']}"
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{described}\n\n{table}\n", encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": about, "rows": list(rows)}, indent=2), encoding="utf-8"
    )
    print(f"{title}\n{described}\n\n{table}\n", flush=True)


def _markdown(rows: Sequence[Mapping[str, Any]], digits: int) -> str:
    head = list(rows[0])
    cells = [head, *([_cell(row[column], digits) for column in head] for row in rows)]
    width = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, width, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def _cell(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def picture(name: str, draw: Callable[[Any, Any], None], panels: int = 1) -> None:
    """``draw(figure, axes)`` into ``results/name.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 3.6), layout="constrained")
    draw(figure, axes)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)
