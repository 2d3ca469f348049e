"""Whole models in int8 and in float32, exact: CPU time in ONNX Runtime and in OpenVINO, each relative to OpenVINO's own.

attnopt's file has dynamic int8 products and attention in float; OpenVINO's is made by NNCF, with activations
calibrated.  attnopt's standard flavor runs in OpenVINO, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import interleaved, let_transformers_import, one_thread, options, publish
from onnx_models import SUBJECTS, Subject
from onnx_peers import in_int8
from onnx_sessions import openvino, runner

import attnopt

LENGTHS = {"MiniLM-L6": (128, 512, 2048), "BERT-base": (128, 512, 2048), "ViT-B/16": (197, 577)}
FLOAT, INT8 = "OpenVINO, float32", "OpenVINO, int8"
BATCHES = 8  # that NNCF calibrates on


def measured(subject: Subject, rounds: int) -> Iterator[dict[str, Any]]:
    lengths = LENGTHS[subject.name]
    groups = [lengths] if subject.kind == "bert" else [(n,) for n in lengths]  # an image's size is the model's
    for group in groups:
        torch.manual_seed(0)
        model, kwargs = subject.build(group[0])
        model.eval()
        with tempfile.TemporaryDirectory() as name, torch.no_grad():
            files = {**_ours(model, kwargs, Path(name)), **_theirs(subject, model, kwargs, group[0], Path(name))}
            for length in group:
                inputs = list(subject.build(length)[1].values())
                calls = {n: run(file, inputs) for n, (run, file) in files.items()}
                times = interleaved(calls, max(5, rounds // (1 + length // 256)))
                yield {
                    "model": subject.name,
                    "length": length,
                    "ms of OpenVINO, float32": 1e3 * times.median(FLOAT),
                    **{n: times.ratio(n, FLOAT) for n in calls if n.endswith("float32") and n != FLOAT},
                    **{f"{n}, of OpenVINO's": times.ratio(n, INT8) for n in calls if n.endswith("int8") and n != INT8},
                    "OpenVINO, int8, of its float32": times.ratio(INT8, FLOAT),
                }


Files = dict[str, tuple[Callable[..., Callable[[], Any]], Path]]


def _ours(model: torch.nn.Module, kwargs: dict[str, torch.Tensor], folder: Path) -> Files:
    found: Files = {}
    fast = attnopt.optimize(model, "fuse", (), kwargs, dynamic_shapes=_free(kwargs), backend="sdpa")
    for place, run, flavor in (("", runner, "onnxruntime"), (" in OpenVINO", openvino, "standard")):
        for what, how in (("float32", None), ("int8", "int8")):
            file = folder / f"{flavor}_{what}.onnx"
            fast.export_onnx(file, flavor=flavor, quantize=how)
            found[f"attnopt{place}, {what}"] = run, file
    return found


def _theirs(
    subject: Subject, model: torch.nn.Module, kwargs: dict[str, torch.Tensor], length: int, folder: Path
) -> Files:
    file = folder / "torch.onnx"
    torch.onnx.export(
        model, (), str(file), kwargs=kwargs, dynamo=True, opset_version=20, verbose=False, dynamic_shapes=_free(kwargs)
    )
    batches = [list(subject.build(length)[1].values()) for _ in range(BATCHES)]
    return {FLOAT: (openvino, file), INT8: (openvino, in_int8(file, batches))}


def _free(kwargs: dict[str, torch.Tensor]) -> dict[str, dict[int, Any]]:
    """Texts may have any length."""
    return {name: {1: torch.export.Dim.DYNAMIC} if x.dim() == 2 else {} for name, x in kwargs.items()}


def main() -> None:
    arguments = options(__doc__, 30)
    one_thread()
    let_transformers_import()
    rows = []
    for subject in SUBJECTS:
        if subject.name in LENGTHS and arguments.only in subject.name:
            for row in measured(subject, arguments.rounds):
                print(row, flush=True)
                rows.append(row)
    publish("onnx_int8", rows, "Whole models in int8 and float32: CPU time relative to OpenVINO's")


if __name__ == "__main__":
    main()
