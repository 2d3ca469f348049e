"""A captured model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from attnopt.capture.calibration import Inputs
from attnopt.capture.dynamic_axes import Auto, Axes, fixed_axes
from attnopt.capture.flat_call import Form

Args = tuple[Any, ...]


Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A captured model: ``module`` is a graph of functional aten operators, called as the model is.

    ``shapes`` are the dynamic shapes in torch.export's notation, ``fixed_axes`` the axes that were to be dynamic and are not,
    and the constraints between the others.  ``own`` is the user's example if the program was captured with another one;
    ``narrower`` is the fallback request if the dynamic axes prove too many.
    """

    module: fx.GraphModule
    args: Args
    kwargs: Kwargs
    shapes: Any = None
    fixed_axes: tuple[str, ...] = ()
    route: str = "export"
    own: Inputs | None = None
    narrower: Auto | None = None
    form: Form | None = None  # if the model takes or returns objects; args and kwargs are then flat

    @property
    def examples(self) -> tuple[Inputs, ...]:
        """What was captured with first."""
        return ((self.args, self.kwargs), *(() if self.own is None else (self.own,)))

    def told(self, asked: list[Axes]) -> Program:
        """With every axis in ``asked`` that is not dynamic listed as static."""
        fixed = fixed_axes(self.module, asked)
        return replace(self, fixed_axes=(*fixed, *(t for t in self.fixed_axes if t not in fixed)))
