"""A model that is looked at on batches of inputs: captured in eval mode, in a form that takes them all."""

from __future__ import annotations

from torch import nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.calibration import Calibration, shapes_of
from attnopt.capture.signature import Signature
from attnopt.compiler.analyze import Analyzed, analyze_in_eval
from attnopt.compiler.check import all_fitting
from attnopt.errors import CaptureError


def analyze_batches(model: nn.Module, calibration: Calibration) -> tuple[Analyzed, list[CallInputs]]:
    """The captured model, and the batches in the form of its graph.  Raises CaptureError and CalibrationError."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected an nn.Module, found {type(model).__name__}", hint="pass the model itself")
    first = calibration.batches[0]
    shapes = "auto" if len({shapes_of(b) for b in calibration}) > 1 else None
    analyzed = analyze_in_eval(model, first, shapes)
    return analyzed, all_fitting(analyzed.program, Signature.of(model.forward, *first), calibration)
