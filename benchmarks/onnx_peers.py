"""The other ways to run a model on a CPU, and the table and picture that show attnopt's beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Times
from onnx_sessions import openvino, runner
from torch.utils import _pytree as pytree

BASE, OURS, BEST = "torch", "attnopt", "attnopt / best other"


def peers(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kind: str, folder: Path
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls by name, all made from torch's own export; ``kind``: what ONNX Runtime's optimizer calls the model."""
    for opset in (20, 23):
        file = str(folder / f"{opset}.onnx")
        torch.onnx.export(model, args, kwargs=kwargs, f=file, dynamo=True, opset_version=opset, verbose=False)
    tensors = pytree.tree_leaves((args, kwargs))
    yield "torch export", runner(folder / "20.onnx", tensors)
    yield "torch export, opset 23", runner(folder / "23.onnx", tensors)
    yield "ORT optimizer", runner(_ort_optimized(kind, model.config, folder), tensors)
    yield "optimize_for_ort", runner(_onnxscript_optimized(folder), tensors)
    yield "OpenVINO", openvino(folder / "20.onnx", tensors)


def _ort_optimized(kind: str, config: Any, folder: Path) -> Path:
    from onnxruntime.transformers import optimizer

    heads, width = config.num_attention_heads, config.hidden_size
    made = optimizer.optimize_model(str(folder / "20.onnx"), kind, heads, width, opt_level=0)
    made.save_model_to_file(str(folder / "ort.onnx"))
    return folder / "ort.onnx"


def _onnxscript_optimized(folder: Path) -> Path:
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made, _ = optimize_for_ort(onnx_ir.load(folder / "20.onnx"))
    onnx_ir.save(made, folder / "onnxscript.onnx")
    return folder / "onnxscript.onnx"


def in_int8(file: Path, batches: Sequence[Sequence[torch.Tensor]]) -> Path:
    """OpenVINO's form of ``file`` after NNCF: weights, embeddings and activations in int8, with scales from ``batches``."""
    import nncf
    import openvino as ov

    data = [[x.numpy() for x in batch] for batch in batches]
    made = nncf.quantize(
        ov.Core().read_model(str(file)),
        nncf.Dataset(data),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(data),
    )
    ov.save_model(made, str(file.with_name("openvino_int8.xml")), compress_to_fp16=False)
    return file.with_name("openvino_int8.xml")


def ratios(times: Times) -> dict[str, float]:
    """The times of all but torch, relative to it."""
    return {name: times.ratio(name, BASE) for name in times.of if name != BASE}


def against_the_best(times: Times) -> dict[str, Any]:
    best = min((name for name in times.of if name != OURS), key=times.median)
    return {"best other": best, BEST: times.ratio(OURS, best)}


def draw(_: Any, axes: Any, rows: list[dict[str, Any]]) -> None:
    names = [c for c, value in rows[0].items() if isinstance(value, float) and c not in (BEST, "torch, ms")]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        axes.bar([x + i * width for x in range(len(rows))], [row[name] for row in rows], width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    places = [x + width * (len(names) - 1) / 2 for x in range(len(rows))]
    axes.set_xticks(places, [f"{row['model']}\n{row['length']}" for row in rows], fontsize=5, rotation=45)
    axes.set_ylabel("CPU time / torch")
    axes.legend(fontsize=5)
