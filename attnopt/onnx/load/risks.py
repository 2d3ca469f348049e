"""Integer divisions that crash the process, in torch or ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnopt.errors import CaptureError
from attnopt.onnx.load.source import Source
from attnopt.onnx.load.values import Known, Value, tensor

if TYPE_CHECKING:
    import onnx

SECONDS = 600


def check_trap(step: Any, values: Mapping[str, Value]) -> None:
    """OverflowError or ZeroDivisionError for an integer node that would crash the process."""
    if getattr(step, "kind", "") not in ("Div", "Mod"):
        return
    a, b = (tensor(values[name]) for name in step.inputs[:2])
    if a.is_floating_point() or b.is_floating_point() or a.dtype == torch.bool:
        return
    if bool((b == 0).any()):
        raise ZeroDivisionError("integers are divided by zero")
    if a.dtype in (torch.int32, torch.int64) and bool(((a == torch.iinfo(a.dtype).min) & (b == -1)).any()):
        raise OverflowError("the least integer is divided by -1")


def risky(source: Source, unread: Collection[int]) -> bool:
    """A division with unchecked operands: in a subgraph, or after an unsupported node."""
    graph = source.model.graph
    inner = [node for i in unread for node in _inside(source.nodes[i])]
    inner += [node for f in source.model.functions for node in f.node]
    if any(_divides(node) for node in inner):
        return True
    from attnopt.onnx.load.grouping import used_by

    late = {name for i in unread for name in source.nodes[i].output}
    for i, node in enumerate(graph.node):
        if i not in unread and late & set(used_by(node)):
            late |= set(node.output)
            if _divides(node):
                return True
    return any(_divides(source.nodes[i]) for i in unread)


def _divides(node: onnx.NodeProto) -> bool:
    return node.op_type in ("Div", "Mod")


def _inside(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield inner
                yield from _inside(inner)


_RUN = """
import sys
import numpy, onnxruntime
o = onnxruntime.SessionOptions()
o.log_severity_level = 4
s = onnxruntime.InferenceSession(sys.argv[1], o, providers=["CPUExecutionProvider"])
try:
    s.run(None, dict(numpy.load(sys.argv[2])))
except Exception:
    pass
"""


def check_in_a_process(source: Source, feed: Mapping[str, Known]) -> None:
    """Raises CaptureError if the file crashes the process that runs it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "inputs.npz"
        with place.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: np.asarray(x) for name, x in feed.items()})
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(source.path), str(place)],
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    if done.returncode < 0:
        raise CaptureError(
            f"{source.path} crashes ONNX Runtime with signal {-done.returncode} on these inputs",
            hint="look for an integer division by zero",
        )
