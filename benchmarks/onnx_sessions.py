"""ONNX files as calls, in ONNX Runtime and in OpenVINO: one thread, float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting is not work
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(path: Path, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """The file in ONNX Runtime, with ``tensors`` as its inputs in their order."""
    loaded = session(path)
    feed = {i.name: t.numpy() for i, t in zip(loaded.get_inputs(), tensors, strict=True)}
    return lambda: loaded.run(None, feed)


def openvino(path: Path, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """The same in OpenVINO, which would choose bfloat16 by itself where the processor has it."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    feed = [t.numpy() for t in tensors]
    return lambda: compiled(feed)
