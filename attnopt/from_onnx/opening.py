"""A file taken for a model only if its module gives what ONNX Runtime gives on the example inputs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnopt.compare import difference, tolerance
from attnopt.compiling import compiling
from attnopt.errors import CaptureError
from attnopt.from_onnx.module import OnnxModule
from attnopt.from_onnx.quoting import quoted, reason
from attnopt.from_onnx.reading import read
from attnopt.from_onnx.values import tensor
from attnopt.onnx_session import cpu_session

ROOM = 10.0  # ONNX Runtime sums in other orders than torch


@compiling()
def opened(path: str | os.PathLike[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OnnxModule:
    """The module of an ONNX file.  Raises CaptureError: without example inputs, or naming the first operator that differs."""
    module = read(path).eval()
    try:
        bound = module.signature.bind(*args, **kwargs).arguments
    except TypeError as e:
        raise CaptureError(
            f"{path} takes {', '.join(module.signature.parameters)}: {e}",
            hint="give example inputs, by place or by name",
        ) from None
    feed = {name: _array(bound[said], said) for name, said in module.inputs.items()}
    try:
        with torch.no_grad(), np.errstate(all="ignore"), _without_traps(module):
            values = module.values(bound)
        _compare(path, module, values, feed)
    except CaptureError:
        raise
    except Exception as e:
        raise CaptureError(f"{path} cannot be run on these inputs: {reason(e)}", hint=_INPUTS) from e
    return module


@contextlib.contextmanager
def _without_traps(module: OnnxModule) -> Iterator[None]:
    """The one division that ends the process, torch's or ONNX Runtime's, is an OverflowError."""

    def check(_: Any, given: Any) -> None:
        a, b = map(tensor, given[0])
        if a.dtype in (torch.int32, torch.int64) and bool(((a == torch.iinfo(a.dtype).min) & (b == -1)).any()):
            raise OverflowError("the least integer is divided by -1")

    hooks = [n.register_forward_pre_hook(check) for n in module.modules() if getattr(n, "kind", "") in ("Div", "Mod")]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compare(path: Any, module: OnnxModule, values: Mapping[str, Any], feed: Mapping[str, Any]) -> None:
    """CaptureError that names the first operator which gives something else than in ONNX Runtime."""
    import onnx

    want = _run(Path(path), feed, str(path))
    if _agree(values, dict(zip(module.outputs, want, strict=True))):
        return
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


_INPUTS = "give inputs of the types and sizes that the file takes"
_HINT = "please report the file, or export the model anew"


def _array(value: Any, name: str) -> Any:
    if not isinstance(value, Tensor):
        raise CaptureError(f"{name} is a {type(value).__name__}, not a tensor", hint="give a tensor for each input")
    return value.detach().cpu().numpy()


def _run(model: Path | bytes, feed: Mapping[str, Any], path: str) -> list[Any]:
    try:
        found: list[Any] = cpu_session(model).run(None, dict(feed))
    except Exception as e:
        raise CaptureError(f"ONNX Runtime cannot run {path}: {quoted(str(e))}", hint=_INPUTS) from e
    return found


def _agree(values: Mapping[str, Any], want: Mapping[str, Any]) -> bool:
    for name, array in want.items():
        there = torch.from_numpy(array)
        here = tensor(values[name]).to(there.dtype)
        if not difference([here], [there]) <= ROOM * tolerance([there]):
            return False
    return True
