"""``attnopt::onnx_nodes``: unsupported nodes of a file, run by ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnopt.base.ort_session import cpu_session
from attnopt.errors import CaptureError
from attnopt.onnx.load.sizes import Sized, parse

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_sessions = WeakTensorKeyDictionary()
_lock = threading.Lock()


@torch.library.custom_op("attnopt::onnx_nodes", mutates_args=())
def onnx_nodes(model: Tensor, inputs: Sequence[Tensor], sizes: Sequence[int], outputs: str) -> list[Tensor]:
    """The results of ``model``, the bytes of an ONNX model, for ``inputs`` in its input order.

    ``outputs``: the dtype and sizes of each output, as printed by ``Sized``, one per line: in terms of the input sizes
    and of ``sizes``, those of the file's free axes.  An output of other sizes is an error: its users were captured for these.
    A graph in double precision gets the results of the file's own precision, widened.
    """
    session = _session(model)
    feed, is_wide = dict[str, Tensor](), False
    for declared, x in zip(session.get_inputs(), inputs, strict=True):
        kind = _FLOATS.get(declared.type, x.dtype)
        is_wide |= x.dtype == torch.float64 != kind
        feed[declared.name] = x.detach().cpu().to(kind).contiguous()
    made = [torch.from_numpy(o) for o in session.run(None, {name: x.numpy() for name, x in feed.items()})]
    shapes = [list(x.shape) for x in inputs]
    for text, name, got in zip(outputs.splitlines(), (o.name for o in session.get_outputs()), made, strict=True):
        said = parse(text)
        want = said.at(shapes, list(sizes))
        if len(want) != got.dim() or any(w is not None and w != g for w, g in zip(want, got.shape, strict=True)):
            raise CaptureError(
                f"{name!r} has shape {list(got.shape)}, but the model was captured for {want}",
                hint="the shape depends on input values: exclude the attentions that use it from the policy",
            )
    device = inputs[0].device if inputs else torch.device("cpu")
    return [(x.double() if is_wide and x.is_floating_point() else x).to(device) for x in made]


@onnx_nodes.register_fake
def _(model: Tensor, inputs: Sequence[Tensor], sizes: Sequence[int], outputs: str) -> list[Tensor]:
    shapes = [list(x.shape) for x in inputs]
    device = inputs[0].device if inputs else model.device
    return [_empty(parse(text), shapes, list(sizes), device) for text in outputs.splitlines()]


def _empty(said: Sized, shapes: list[list[int]], sizes: list[int], device: torch.device) -> Tensor:
    shape = [torch.library.get_ctx().new_dynamic_size() if n is None else n for n in said.at(shapes, sizes)]
    return torch.empty(shape, dtype=said.dtype, device=device)


def _session(model: Tensor) -> InferenceSession:
    with _lock:
        if model not in _sessions:
            _sessions[model] = cpu_session(model.numpy().tobytes(), threads=torch.get_num_threads(), exact=True)
        return _sessions[model]
