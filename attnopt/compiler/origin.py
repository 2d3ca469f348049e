"""Where an optimized graph comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.flat_call import Form
from attnopt.capture.signature import Signature
from attnopt.graph.nodes import inputs_of
from attnopt.ir.site import Site
from attnopt.report.report import Report


@dataclass(frozen=True)
class FileOrigin:
    """The ONNX file of a graph: its module, the original graph, the plans, and what the file calls the inputs of the graph."""

    model: Any
    captured: fx.GraphModule
    plans: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()

    def inputs(self, graph: fx.Graph) -> dict[fx.Node, str]:
        """The inputs of the captured ``graph``, or of one made of it, and their names in the file."""
        return dict(zip(inputs_of(graph), self.names, strict=True))

    def added(self, graph: fx.Graph) -> dict[str, fx.Node]:
        """Those that the file does not have yet."""
        return {name: node for node, name in self.inputs(graph).items() if name not in self.model.inputs}


@dataclass(frozen=True)
class Origin:
    """The origin of an optimized graph: what was done, its signature, and the inputs of its capture."""

    report: Report
    sites: tuple[Site, ...]
    signature: Signature
    inputs: CallInputs = field(repr=False, default=CallInputs((), {}))
    shapes: object = None
    trains_otherwise: bool = False  # captured for inference, and the model has dropout or batch normalisation
    form: Form | None = None  # if objects are among the inputs or outputs; the inputs are then flat
    file: FileOrigin | None = field(repr=False, default=None)


def is_file(model: object) -> bool:
    """A module that represents an ONNX file."""
    return hasattr(model, "source") and type(model).__module__ == "attnopt.onnx.load.module"
