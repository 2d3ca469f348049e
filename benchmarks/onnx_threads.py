"""Whole models in ONNX Runtime with one, two and the default number of threads: wall and CPU time of attnopt's exact file
against the best of torch's export, onnxscript's and ONNX Runtime's optimizers.

Wanted: at most 1.00 everywhere.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Times, interleaved, let_transformers_import, options, publish
from onnx_models import SUBJECTS, Subject, ours
from onnx_peers import OURS, peers

CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}
LENGTHS = {"MiniLM-L6": (16, 128, 512), "BERT-base": (16, 128, 512), "ViT-B/16": (197,), "SmolLM2, prefill": (16, 128)}


def measured(subject: Subject, length: int, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, kwargs = subject.build(length)
    model.eval()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        calls: dict[str, Callable[[], Any]] = {OURS: ours(model, "fuse", kwargs, folder / "ours.onnx")}
        calls |= {n: call for n, call in peers(model, (), kwargs, subject.kind, folder) if n != "OpenVINO"}
        times = {what: interleaved(calls, rounds, warm_up=3, clock=clock) for what, clock in CLOCKS.items()}
    best = min((n for n in calls if n != OURS), key=times["wall"].median)
    row = {
        "model": subject.name,
        "length": length,
        "threads": threads,
        "best other": best,
        **{f"{what} time": shown(found, best) for what, found in times.items()},
    }
    print(row, flush=True)
    return row


def shown(times: Times, best: str) -> str:
    low, high = times.spread(OURS, best)
    return f"{times.ratio(OURS, best):.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    arguments = options(__doc__, 40)
    let_transformers_import()
    counts = sorted({1, 2, os.cpu_count() or 1})
    rows = [
        measured(subject, length, threads, arguments.rounds)
        for subject in SUBJECTS
        if arguments.only in subject.name
        for length in LENGTHS[subject.name]
        for threads in counts
    ]
    publish("onnx_threads", rows, "Whole models in ONNX Runtime, exact: attnopt's time / the best other's (quartiles)")


if __name__ == "__main__":
    main()
