"""The first half of everything that looks at a model: capture it, and find its attentions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.export import ExportedProgram

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture, require_values
from attnopt.capture.program import Program
from attnopt.match.find import Findings, find


@dataclass(frozen=True)
class Analyzed:
    """A captured program, and the attentions that were found in it."""

    program: Program
    findings: Findings


def analyze(model: nn.Module | ExportedProgram, inputs: CallInputs, dynamic_shapes: object = None) -> Analyzed:
    """``dynamic_shapes``: as of ``capture``.  Raises CaptureError."""
    program = capture(model, inputs, dynamic_shapes)
    return Analyzed(program, find(program))


def analyze_in_eval(model: nn.Module, inputs: CallInputs, dynamic_shapes: object = None) -> Analyzed:
    """The model as it infers; its own mode stays.  Raises CaptureError, also for a model without weights."""
    require_values(model)
    modes = [(m, m.training) for m in model.modules()]
    try:
        return analyze(model.eval(), inputs, dynamic_shapes)
    finally:
        for m, mode in modes:
            m.training = mode
