"""ONNX Runtime on a CPU, without its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def cpu_session(model: Path | bytes, threads: int = 0) -> Any:
    """``threads``: as many as ONNX Runtime likes if 0.  Raises whatever it raises for a file that it cannot load."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
