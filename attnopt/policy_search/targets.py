"""What a budget of latency measures: a call in torch or in ONNX Runtime, or a token that ONNX Runtime decodes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from attnopt.base.call_inputs import CallInputs
from attnopt.errors import ExportError
from attnopt.ir.refusal import Refusal
from attnopt.model import OptimizedModel
from attnopt.policy_search.data import batch_of, length_of

Call = Callable[[], object]

TORCH, TOKEN = "torch", "token"
TARGETS = {
    TORCH: "torch",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-int8": "ONNX Runtime in int8",
    TOKEN: "ONNX Runtime, for one token",
}


def call_of(target: str, model: nn.Module, inputs: CallInputs, device: str = "cpu") -> Call:
    """One call of ``model``, ready to be timed; of a target other than torch an OptimizedModel.  Raises ExportError."""
    if target == TORCH:
        return _torch_call(model, inputs, device)
    from attnopt.onnx.export.timed_calls import model_call, token_call

    assert isinstance(model, OptimizedModel)
    if target == TOKEN:
        return token_call(model.graph_module, model.origin, batch_of(inputs), length_of(inputs))
    given, _ = model.arranged(*inputs)
    return model_call(model.graph_module, model.origin, given, "int8" if target == "onnxruntime-int8" else None)


def refusal(target: str, error: ExportError) -> Refusal:
    """Of a choice that the target cannot run."""
    return Refusal("not-on-target", f"what runs in {TARGETS[target]}", why(error), hint=error.hint or "")


def why(error: ExportError) -> str:
    return f"{error.site}: {error.message}" if error.site else error.message


def require_cache(model: OptimizedModel) -> None:
    """Raises ExportError for a model that is no decoder whose keys and values ONNX Runtime can keep."""
    from attnopt.onnx.export import timed_calls

    timed_calls.require_cache(model.graph_module, model.origin)


def _torch_call(model: nn.Module, inputs: CallInputs, device: str) -> Call:
    is_gpu = device.startswith("cuda")

    def call() -> object:
        made = model(*inputs.args, **inputs.kwargs)
        if is_gpu:
            torch.cuda.synchronize()
        return made

    return call
