"""Does ``attnopt.diff`` raise a false alarm?  Honest exports of the zoo by every exporter, one line each.

    python audit_zoo.py                        # every model and exporter of tests/support/zoo.py and audited.py
    python audit_zoo.py --only 'qwen*' --by 'dynamo-*'

An exporter that cannot export a model, or whose file ONNX Runtime does not run, is counted and no alarm.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import audited
import torch
from audited import Layer, Model
from torch import nn
from torch.utils import _pytree as pytree

import attnopt

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


def exported(by: str, model: nn.Module, args: tuple[torch.Tensor, ...], names: list[str], folder: Path) -> Path:
    """With free batch and length where the inputs are token ids; images stay as they are.  What optimizes files gets torch's."""
    is_text = all(x.dim() == 2 and not x.is_floating_point() for x in args)
    path = folder / f"{by}.onnx"
    if path.exists():
        return path
    if by.startswith("dynamo"):
        return audited.by_dynamo(model, args, path, int(by.removeprefix("dynamo-")), names, is_text)
    if by == "script-17":
        return audited.by_script(model, args, path, names, ("batch", "length") if is_text else ("batch",))
    plain = exported("dynamo-18" if by in ("onnxscript", "session") else "script-17", model, args, names, folder)
    if by == "session":
        return audited.fused_by_session(plain, path)
    if by == "quantized":
        return audited.in_eight_bits(plain, path)
    shutil.copy(plain, path)
    return (
        audited.fused_by_onnxscript(path)
        if by == "onnxscript"
        else audited.fused_by_runtime(path, by.removeprefix("runtime-"))
    )


EXPORTERS = (
    "script-17", "onnxscript", "dynamo-18", "runtime-bert", "dynamo-23", "session", "quantized", "runtime-gpt2", "dynamo-20",
    "dynamo-24",
)  # fmt: skip


def prepared(build: Callable[[], Built]) -> tuple[nn.Module, tuple[torch.Tensor, ...], list[str]]:
    built = build()
    if mixed(built):
        built = (built[0], (), {"input_ids": built[1][0], **built[2]})
    return wrapped(built)


def outcome(model: nn.Module, args: tuple[torch.Tensor, ...], names: list[str], by: str, folder: Path) -> str:
    try:
        path = exported(by, model, args, names, folder)
    except Exception as error:
        return f"no export ({type(error).__name__})"
    try:
        audit = attnopt.diff(model, path, args)
    except attnopt.AttnoptError as error:
        return f"not read ({str(error).splitlines()[0][:150]})"
    if audit.verdict == "same":
        return f"same, {len(audit.sites)} attentions, at {max((n for s in audit.sites for n in s.tokens), default=0)} tokens"
    told = [s for s in audit.sites if s.verdict != "same"]
    why = "; ".join(f"{s.name}: {[f'{d.kind}: {d.model} / {d.file}' for d in s.differences] or s.why}" for s in told)
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
    _once()
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for by, (name, build) in product(EXPORTERS, models().items()):
            if not fnmatch.fnmatch(name, arguments.only) or not fnmatch.fnmatch(by, arguments.by):
                continue
            start, folder = time.monotonic(), Path(root, name.replace(":", "-"))
            folder.mkdir(exist_ok=True)
            try:
                made[name] = made.get(name) or prepared(build)
                found = outcome(*made[name], by, folder)
            except Exception as error:
                found = f"FAILED ({type(error).__name__}: {str(error)[:200]})"
            counts[found.split(",")[0].split(" (")[0]] += 1
            print(f"{time.monotonic() - start:4.0f} s  {name:16} {by:13} {found}", flush=True)
    print(dict(counts))
    return 1 if counts["ALARM"] or counts["FAILED"] else 0


def _once() -> None:
    """A model is captured once for all of its files."""
    from attnopt.audit import calls

    captured, known = calls.analyze_in_eval, dict[int, Any]()

    def analyzed(model: nn.Module, *given: Any) -> Any:
        known[id(model)] = known.get(id(model)) or captured(model, *given)
        return known[id(model)]

    calls.analyze_in_eval = analyzed


if __name__ == "__main__":
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.exit(main())
