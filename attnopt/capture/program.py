"""A captured model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.dynamic_axes import Auto, Axes, fixed_axes
from attnopt.capture.flat_call import Form


@dataclass(frozen=True)
class Program:
    """A captured model: ``module`` is a graph of functional aten operators, called as the model is.

    ``shapes`` are the dynamic shapes in torch.export's notation, ``fixed_axes`` the axes that were to be dynamic and are not,
    and the constraints between the others.  ``own`` is the user's example if the program was captured with another one;
    ``narrower`` is the fallback request if the dynamic axes prove too many.
    """

    module: fx.GraphModule
    inputs: CallInputs
    shapes: object = None
    fixed_axes: tuple[str, ...] = ()
    route: str = "export"
    own: CallInputs | None = None
    narrower: Auto | None = None
    form: Form | None = None  # if the model takes or returns objects; the inputs are then flat

    @property
    def examples(self) -> tuple[CallInputs, ...]:
        """What was captured with first."""
        return (self.inputs, *(() if self.own is None else (self.own,)))

    def told(self, asked: list[Axes]) -> Program:
        """With every axis in ``asked`` that is not dynamic listed as static."""
        fixed = fixed_axes(self.module, asked)
        return replace(self, fixed_axes=(*fixed, *(t for t in self.fixed_axes if t not in fixed)))
