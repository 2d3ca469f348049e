"""ONNX Runtime on a CPU, without its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def cpu_session(model: Path | bytes) -> Any:
    """Raises whatever ONNX Runtime raises for a file that it cannot load."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
