"""A model, or the file of one."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.input import Input
from attnopt.errors import CaptureError


def opened(model: nn.Module | str | os.PathLike[str], inputs: CallInputs, brought: Iterable[Input] = ()) -> nn.Module:
    """The model itself, or the module of an ONNX file.  ``brought``: inputs that the file need not have.  Raises CaptureError."""
    if not isinstance(model, (str, os.PathLike)):
        return model
    if not os.path.exists(model):
        raise CaptureError(
            f"there is no file {os.fspath(model)}", hint="pass the path of an .onnx file, or the model itself"
        )
    from attnopt.onnx.load.load import opened as read  # what is heavy comes with files alone

    return read(model, *inputs, {i.name for i in brought})
