"""ONNX Runtime on a CPU, without its log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def cpu_session(
    model: Path | bytes, threads: int = 0, folder: Path | None = None, exact: bool = False
) -> InferenceSession:
    """``threads``: 0 lets ONNX Runtime choose.  ``folder``: location of external weights of ``model``.
    ``exact``: follow the file; ONNX Runtime would otherwise fuse quantized operators into ones that round differently.

    Raises the errors of ONNX Runtime for a file that it cannot load.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def operator_kinds(model: Tensor) -> list[str]:
    """The operator of each node of ``model``, the bytes of an ONNX model, including branches and loops; with its domain
    where that is not ONNX's own."""
    import onnx

    found: list[str] = []
    graphs = [onnx.ModelProto.FromString(model.numpy().tobytes()).graph]
    while graphs:
        for node in graphs.pop().node:
            found.append(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
            graphs += [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    return found
