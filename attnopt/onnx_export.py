"""ONNX for ONNX Runtime: exported by torch, run and compared before it gets its name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.archive import exported
from attnopt.capture import quiet
from attnopt.compare import difference, tensors, tolerance
from attnopt.errors import ExportError
from attnopt.files import atomic_write
from attnopt.graph import Emitter, aten, dtype, is_call
from attnopt.lowering import copy_program
from attnopt.normaliser import SDPA
from attnopt.origin import Origin

OPSETS = (23, 24, 25)  # below, SDPA is taken apart; opset 26 is silently written wrong by torch 2.13
FLOOR = -1e30
ROOM = 10.0  # ONNX Runtime sums in other orders than torch
_TWO_GIB = 2**31 - 1


def export_onnx(gm: fx.GraphModule, origin: Origin, path: str | os.PathLike[str], *, opset: int, verify: bool) -> None:
    """Write an optimized graph to ``path``.  Raises ExportError, and then leaves what was at ``path`` as it was."""
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported", hint=f"choose one of {', '.join(map(str, OPSETS))}")
    size = sum(p.numel() * p.element_size() for p in gm.parameters())
    if size > _TWO_GIB:
        raise ExportError(
            f"the model's {size / 2**30:.1f} GiB of weights do not fit into one ONNX file, which holds 2 GiB"
        )
    with atomic_write(path) as temporary:
        _write(gm, origin, temporary, opset)
        if verify:
            _compare(gm, origin, temporary)


def _write(gm: fx.GraphModule, origin: Origin, file: Path, opset: int) -> None:
    try:
        with quiet():
            program = exported(_with_soft_floors(gm), origin)
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
            assert made is not None
            made.save(str(file), external_data=False)
    except Exception as e:
        if isinstance(e, OSError):
            raise
        raise ExportError(
            f"torch.onnx could not export the graph: {_first_cause(e)}",
            hint="the named operator has no ONNX form in this opset",
        ) from e


def _with_soft_floors(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which additive masks stop at -1e30.

    ONNX Runtime's Attention takes the dtype's minimum for "hidden" and gives zeros to a query with nothing else, where
    torch gives the mean of all values.  -1e30 hides just as well and means the same to both; -inf stays what it is.
    """
    module, _ = copy_program(gm)
    for node in list(module.graph.nodes):
        mask = (node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")) if is_call(node, SDPA) else None
        if not isinstance(mask, fx.Node) or not dtype(mask).is_floating_point or torch.finfo(dtype(mask)).min > FLOOR:
            continue
        emit = Emitter(module.graph, node)
        floored = emit.call(aten.clamp.default, mask, FLOOR)
        softened = emit.call(aten.where.self, emit.call(aten.isinf.default, mask), mask, floored)
        node.replace_input_with(mask, softened)
    module.recompile()
    return module


def _first_cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    text = re.sub("\x1b\\[[0-9;]*m", "", str(e))
    return f"{type(e).__name__}: " + " | ".join(line.strip() for line in text.splitlines() if line.strip())[:300]


def _compare(gm: fx.GraphModule, origin: Origin, file: Path) -> None:
    """Run the file in ONNX Runtime on the example inputs; it must give what torch gives."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        values = [t for t in pytree.tree_leaves((origin.args, dict(origin.kwargs))) if isinstance(t, Tensor)]
        feed = _feed([i.name for i in session.get_inputs()], gm, values)
        got = [torch.from_numpy(o) for o in session.run(None, feed)]
    except ExportError:
        raise
    except Exception as e:
        raise ExportError(f"ONNX Runtime cannot run the exported model: {str(e)[:300]}") from e
    with torch.no_grad():
        want = tensors(gm(*origin.args, **origin.kwargs))
    error = difference([g.to(w.dtype) for g, w in zip(got, want, strict=False)], want)
    if len(got) != len(want) or not error <= ROOM * tolerance(want):
        raise ExportError(
            f"ONNX Runtime gives other numbers than torch (relative difference {error:.2g}), so nothing was written",
            hint="please report the model; another opset may work",
        )


def _feed(names: list[str], gm: fx.GraphModule, values: list[Tensor]) -> dict[str, Any]:
    """The session's inputs; an input that the graph does not use may be missing from it."""
    if len(names) == len(values):
        return {n: v.detach().cpu().numpy() for n, v in zip(names, values, strict=True)}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]
    by_name = {n.name: v for n, v in zip(placeholders, values, strict=True)}
    if not set(names) <= set(by_name):
        raise ExportError(f"the exported model has inputs {names}, the model has {sorted(by_name)}")
    return {n: by_name[n].detach().cpu().numpy() for n in names}
