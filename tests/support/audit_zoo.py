"""Does ``attnopt.diff`` raise a false alarm?  Honest exports of the zoo by every exporter, one line each.

    python audit_zoo.py                        # every model and exporter of tests/support/zoo.py and audited.py
    python audit_zoo.py --only 'qwen*' --by 'dynamo-*'

An exporter that cannot export a model, or whose file ONNX Runtime does not run, is counted and no alarm.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audited
import torch
from audited import Layer, Model
from torch import nn
from torch.utils import _pytree as pytree

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
OWN = {
    "decoder": Layer(),
    "window": Layer(window=5),
    "window-4096": Layer(window=4096),
    "sinks-softcap": Layer(window=5, sinks=True, softcap=6.0),
    "encoder": Layer(kv=4, causal=False, turn=None),
    "alibi": Layer(kv=4, causal=False, turn=None, alibi=0.5),
    "normed": Layer(normed=True),
    "tiled": Layer(tiled=True),
    "unmasked": Layer(kv=4, causal=False, turn=None, padding=False),
}


class Named(nn.Module):
    """The model with tensors by name only, and its first output: what every exporter takes and gives."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: torch.Tensor) -> Any:
        made = self.model(**dict(zip(self.names, given, strict=True))) if self.names[0] else self.model(*given)
        return next(x for x in pytree.tree_leaves(made) if isinstance(x, torch.Tensor))


def models() -> dict[str, Callable[[], Built]]:
    import zoo

    found: dict[str, Callable[[], Built]] = {e.name: e.build for e in zoo.ENTRIES}
    for name, layer in OWN.items():
        found[f"own:{name}"] = lambda layer=layer: (Model(layer, layer), audited.inputs(), {})
    return found


def wrapped(built: Built) -> tuple[nn.Module, tuple[torch.Tensor, ...], list[str]]:
    model, args, kwargs = built
    made = Named(model.eval(), list(kwargs) if kwargs else [""])
    return made, (*args, *kwargs.values()), list(kwargs) or [f"x{i}" for i in range(len(args))]


def mixed(built: Built) -> bool:
    return bool(built[1]) and bool(built[2])


def exported(by: str, model: nn.Module, args: tuple[torch.Tensor, ...], names: list[str], path: Path) -> Path:
    """With free batch and length where the inputs are token ids; images stay as they are."""
    free = all(x.dim() == 2 and not x.is_floating_point() for x in args)
    if by.startswith("dynamo"):
        opset = int(by.removeprefix("dynamo-"))
        if free:
            return audited.by_dynamo(model, args, path, opset, names)
        torch.onnx.export(model, args, str(path), dynamo=True, opset_version=opset, input_names=names, verbose=False)
        return path
    if by == "script-17":
        axes = {n: {0: "batch", 1: "length"} for n in names} if free else {n: {0: "batch"} for n in names}
        torch.onnx.export(model, args, str(path), dynamo=False, opset_version=17, dynamic_axes=axes, input_names=names)
        return path
    return optimized(by, model, args, names, path)


def optimized(by: str, model: nn.Module, args: tuple[torch.Tensor, ...], names: list[str], path: Path) -> Path:
    """torch's file, optimized by somebody else."""
    if by == "onnxscript":
        import onnx_ir
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        made: Any = optimize_for_ort(onnx_ir.load(str(exported("dynamo-18", model, args, names, path))))
        onnx_ir.save(made[0] if isinstance(made, tuple) else made, str(path))
    elif by.startswith("runtime-"):
        from onnxruntime.transformers import optimizer

        exported("script-17", model, args, names, path)
        optimizer.optimize_model(str(path), by.removeprefix("runtime-"), num_heads=0, hidden_size=0, opt_level=0).save_model_to_file(
            str(path)
        )
    elif by == "session":  # ONNX Runtime's own graph optimizations, as it writes them
        import onnxruntime

        plain = exported("dynamo-18", model, args, names, path.with_suffix(".plain.onnx"))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    elif by == "quantized":
        from onnxruntime.quantization import quantize_dynamic

        plain = exported("script-17", model, args, names, path.with_suffix(".plain.onnx"))
        quantize_dynamic(str(plain), str(path), op_types_to_quantize=["MatMul", "Gemm"])
    return path


EXPORTERS = (
    "dynamo-18", "dynamo-20", "dynamo-23", "dynamo-24", "script-17", "onnxscript", "runtime-bert", "runtime-gpt2", "session",
    "quantized",
)  # fmt: skip


def outcome(build: Callable[[], Built], by: str, folder: Path) -> str:
    import attnopt

    built = build()
    model, args, names = wrapped(built)
    if mixed(built):
        bound = {**dict(zip(("input_ids",), built[1], strict=True)), **built[2]}
        model, args, names = wrapped((built[0], (), bound))
    path = folder / "m.onnx"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exported(by, model, args, names, path)
    except Exception as error:
        return f"no export ({type(error).__name__})"
    try:
        audit = attnopt.diff(model, path, args)
    except attnopt.AttnoptError as error:
        return f"not read ({str(error).splitlines()[0][:150]})"
    if audit.verdict == "same":
        return f"same, {len(audit.sites)} attentions, at {max((n for s in audit.sites for n in s.tokens), default=0)} tokens"
    why = "; ".join(
        f"{s.name}: {[f'{d.kind}: {d.model} / {d.file}' for d in s.differences] or s.why}" for s in audit.sites if s.verdict != "same"
    )
    outputs = ", ".join(f"{o.error:.1e}" for o in audit.outputs)
    return f"{'ALARM' if audit.verdict == 'differs' else 'not compared'} ({why[:400]}) outputs {outputs}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="*")
    parser.add_argument("--by", default="*")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for name, build in models().items():
        for by in EXPORTERS:
            if not fnmatch.fnmatch(name, arguments.only) or not fnmatch.fnmatch(by, arguments.by):
                continue
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = outcome(build, by, Path(folder))
                except Exception as error:
                    found = f"FAILED ({type(error).__name__}: {str(error)[:200]})"
            counts[found.split(",")[0].split(" (")[0]] += 1
            print(f"{time.monotonic() - start:4.0f} s  {name:16} {by:13} {found}", flush=True)
    print(dict(counts))
    return 1 if counts["ALARM"] or counts["FAILED"] else 0


if __name__ == "__main__":
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.exit(main())
