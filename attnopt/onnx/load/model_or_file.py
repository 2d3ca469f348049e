"""A model, or the file of one."""

from __future__ import annotations

import os

from torch import nn

from attnopt.base.call_inputs import CallInputs


def opened(model: nn.Module | str | os.PathLike[str], inputs: CallInputs) -> nn.Module:
    """The model itself, or the module of an ONNX file.  Raises CaptureError."""
    if not isinstance(model, (str, os.PathLike)):
        return model
    from attnopt.onnx.load.load import opened as read  # what is heavy comes with files alone

    return read(model, *inputs)
