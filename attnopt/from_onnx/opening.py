"""A file taken for a model only if its module gives what ONNX Runtime gives on the example inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.compare import difference, tolerance
from attnopt.compiling import compiling
from attnopt.errors import CaptureError
from attnopt.from_onnx.module import OnnxModule
from attnopt.from_onnx.reading import read
from attnopt.onnx_session import cpu_session

ROOM = 10.0  # ONNX Runtime sums in other orders than torch


@compiling()
def opened(path: str | os.PathLike[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OnnxModule:
    """The module of an ONNX file.  Raises CaptureError: without example inputs, or naming the first operator that differs."""
    import onnx

    module = read(path).eval()
    try:
        bound = module.signature.bind(*args, **kwargs).arguments
    except TypeError as e:
        raise CaptureError(
            f"{path} takes {', '.join(module.signature.parameters)}: {e}",
            hint="give example inputs, by place or by name",
        ) from None
    feed = {name: _array(bound[said], said) for name, said in module.inputs.items()}
    want = _run(Path(path), feed, str(path))  # before torch, because it knows what the file takes
    with torch.no_grad():
        values = module.values(bound)
    if _agree(values, dict(zip(module.outputs, want, strict=True))):
        return module
    model = onnx.load(path)
    names = [output for node in model.graph.node for output in node.output if output]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    every = dict(zip(names, _run(model.SerializeToString(), feed, str(path)), strict=True))
    for node in model.graph.node:
        if not _agree(values, {name: every[name] for name in node.output if name in values and name in every}):
            raise CaptureError(
                f"{path}: {node.op_type} {node.name!r} gives other numbers than in ONNX Runtime", hint=_HINT
            )
    raise CaptureError(f"{path} gives other numbers than in ONNX Runtime", hint=_HINT)


_HINT = "please report the file, or export the model anew"


def _array(value: Any, name: str) -> Any:
    if not isinstance(value, Tensor):
        raise CaptureError(f"{name} is a {type(value).__name__}, not a tensor", hint="give a tensor for each input")
    return value.detach().cpu().numpy()


def _run(model: Path | bytes, feed: Mapping[str, Any], path: str) -> list[Any]:
    try:
        found: list[Any] = cpu_session(model).run(None, dict(feed))
    except Exception as e:
        raise CaptureError(
            f"ONNX Runtime cannot run {path}: {str(e)[:300]}",
            hint="give inputs of the types and sizes that the file takes",
        ) from e
    return found


def _agree(values: Mapping[str, Any], want: Mapping[str, Any]) -> bool:
    from attnopt.from_onnx.values import tensor

    for name, array in want.items():
        there = torch.from_numpy(array)
        here = tensor(values[name]).to(there.dtype)
        if not difference([here], [there]) <= ROOM * tolerance([there]):
            return False
    return True
