"""The axes that a file leaves open, kept open while its module is captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.export import Dim

from attnopt.base.call_inputs import CallInputs
from attnopt.onnx.load.module import OnnxModule
from attnopt.onnx.load.unread import Runs, repeated

SMALLEST = 2  # a tracer treats an axis of one element as static


def as_declared(model: OnnxModule, inputs: CallInputs, dynamic_shapes: object) -> tuple[CallInputs, object]:
    """Example inputs, and the dynamic shapes that the file declares; those of the caller stay unchanged, as do inputs that the
    file does not have."""
    if dynamic_shapes not in (None, "auto") or not any(inputs):
        return inputs, dynamic_shapes
    own = {said: x for said, x in inputs.kwargs.items() if said in model.signature.parameters}
    given = model.signature.bind(*inputs.args, **own).arguments
    larger = _larger(model, given)
    free = model.free
    shapes = {said: dict.fromkeys(free.get(said, []), Dim.AUTO) or None for said in given}
    named = list(given)[: len(inputs.args)]
    made = CallInputs(
        tuple(larger[said] for said in named), {said: larger.get(said, x) for said, x in inputs.kwargs.items()}
    )
    return made, shapes if free else {}


def _larger(model: OnnxModule, given: Mapping[str, Any]) -> dict[str, Any]:
    """The example with its rows repeated along free axes of one element, if the file runs on it."""
    source = model.source
    sizes = [max(SMALLEST, given[model.inputs[name]].shape[axis]) for name, axis, _ in source.free]
    feed = {name: given[said].detach().cpu().numpy() for name, said in model.inputs.items()}
    larger = repeated(source, feed, sizes)
    try:
        Runs(source, (larger,)).values([])
    except Exception:
        return dict(given)
    import torch

    return {
        said: given[said] if larger[name].shape == feed[name].shape else torch.from_numpy(larger[name])
        for name, said in model.inputs.items()
    }
