"""A model on its way: saved and loaded, and as an ONNX file, at other sizes than it was optimized with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnxruntime
import torch
from oracle import assert_same, run
from torch import Tensor

import attnopt


def assert_travels(fast: attnopt.OptimizedModel, folder: Path, others: Iterable[Tensor]) -> None:
    """Loaded, it gives the same, bit for bit; in ONNX Runtime, the same but for rounding.  ``others``: its one input."""
    fast.save(folder / "saved")
    loaded = attnopt.load(folder / "saved")
    assert loaded.sites[0].spec == fast.sites[0].spec
    fast.export_onnx(folder / "m.onnx")
    session = onnxruntime.InferenceSession(str(folder / "m.onnx"))
    for x in others:
        want = run(fast, (x,))
        assert torch.equal(run(loaded, (x,))[0], want[0])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same([torch.from_numpy(y)], want)
