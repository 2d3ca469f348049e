"""Ways to run one model on a CPU, side by side: torch, torch's own ONNX export, OpenVINO on it, and attnopt's files."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnopt.base.cpu_timing import interleaved, one_thread
from attnopt.base.progress import watched, working
from attnopt.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnopt.base.call_inputs import CallInputs

Arrays = list[NDArray[Any]]
TORCH, PLAIN, OPENVINO = "torch", "torch's export", "OpenVINO"


@dataclass(frozen=True)
class Way:
    """One column of the table.  ``call`` takes the tensors of the model's inputs, in their order, and returns its outputs."""

    name: str
    call: Callable[[Sequence[Tensor]], Arrays]
    megabytes: float


def in_torch(model: nn.Module, inputs: CallInputs) -> Way:
    """The model itself; what is no tensor in ``inputs`` stays as it is."""
    import torch
    from torch.utils import _pytree as pytree

    from attnopt.base.closeness import tensors

    leaves, form = pytree.tree_flatten((inputs.args, inputs.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def call(given: Sequence[Tensor]) -> Arrays:
        filled = list(leaves)
        for place, x in zip(places, given, strict=True):
            filled[place] = x
        args, kwargs = pytree.tree_unflatten(filled, form)
        with torch.inference_mode():
            return [x.numpy() for x in tensors(model(*args, **kwargs))]

    return Way(TORCH, call, sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6)


def in_onnxruntime(name: str, path: Path) -> Way:
    """A file in ONNX Runtime: one thread, so that CPU time measures work and not waiting."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def call(given: Sequence[Tensor]) -> Arrays:
        if len(names) != len(given):
            raise ExportError(f"{path} takes {', '.join(names)}; the model takes {len(given)} tensors")
        found: Arrays = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        return found

    return Way(name, call, file_megabytes(path))


def in_openvino(path: Path) -> Way:
    """The same in OpenVINO, in float32: by itself it would take bfloat16 where the processor has it."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)

    def call(given: Sequence[Tensor]) -> Arrays:
        found = compiled([x.numpy() for x in given])
        return [np.asarray(found[i]) for i in range(len(compiled.outputs))]

    return Way(OPENVINO, call, file_megabytes(path))


def others(
    model: nn.Module, inputs: CallInputs, shapes: Any, path: Path, say: Callable[[object], None]
) -> Iterator[Way]:
    """torch's own export in ONNX Runtime, and in OpenVINO if that is installed.  What fails is told and left out."""
    import torch

    try:
        with warnings.catch_warnings(), working("exporting with torch, to compare"):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, inputs.args, str(path), kwargs=inputs.kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
        yield in_onnxruntime(PLAIN, path)
    except Exception as error:  # of an exporter that is not ours
        say(f"  torch's own export is left out: {_first_line(error)}")
        return
    if importlib.util.find_spec("openvino") is None:
        say("  OpenVINO is left out: it is not installed (pip install openvino)")
        return
    try:
        yield in_openvino(path)
    except Exception as error:
        say(f"  OpenVINO is left out: {_first_line(error)}")


def cosine(way: Way, own: Way, given: Sequence[Tensor]) -> float:
    """The lowest of any floating-point output to that of ``own``; NaN where outputs have other shapes."""
    got, want = way.call(given), own.call(given)
    pairs = [(g, w) for g, w in zip(got, want, strict=False) if np.issubdtype(w.dtype, np.floating)]
    if len(got) != len(want) or any(g.shape != w.shape for g, w in pairs):
        return float("nan")
    return min((_cosine(g, w) for g, w in pairs), default=1.0)


def milliseconds(ways: Sequence[Way], given: Sequence[Tensor], rounds: int, what: str) -> dict[str, float]:
    """Median CPU time of one call by way, on one thread, interleaved."""
    calls = {way.name: partial(way.call, given) for way in ways}
    with one_thread():
        times = interleaved(calls, rounds, 1, partial(watched, what=f"measuring {what}"))
    return {name: 1e3 * times.median(name) for name in calls}


def file_megabytes(path: Path) -> float:
    """With the external weight files of a large model."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 1e6


def _cosine(got: NDArray[Any], want: NDArray[Any]) -> float:
    a, b = got.ravel().astype(np.float64), want.ravel().astype(np.float64)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else float(np.array_equal(a, b))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
