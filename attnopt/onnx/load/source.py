"""What is known of a file before it is run: its graph, its constants, its free axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Source:
    """An ONNX file.  ``stored``: the model as stored; ``model``: with its weights and without functions.  ``opens_fused``: the
    operators of ``fused_operators`` are read, too."""

    path: Path
    stored: onnx.ModelProto
    model: onnx.ModelProto
    opens_fused: bool = False

    @property
    def opset(self) -> int:
        return next((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 0)

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        return list(self.model.graph.node)

    @cached_property
    def weights(self) -> dict[str, onnx.TensorProto]:
        return {t.name: t for t in self.model.graph.initializer}

    @cached_property
    def constant_nodes(self) -> dict[str, onnx.NodeProto]:
        return {n.output[0]: n for n in self.nodes if n.op_type == "Constant" and n.domain in ("", "ai.onnx")}

    @cached_property
    def constants(self) -> frozenset[str]:
        return frozenset((*self.weights, *self.constant_nodes))

    @cached_property
    def names(self) -> frozenset[str]:
        """Of all values and weights, also within branches and loops."""
        return frozenset(name for model in (self.stored, self.model) for name in _names(model.graph))

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """The inputs of a caller."""
        return [i for i in self.model.graph.input if i.name not in self.weights]

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self.model.graph.output]

    @cached_property
    def free(self) -> list[tuple[str, int, str]]:
        """(input, axis, name of the axis) of every axis whose size the file leaves open; the name may be empty."""
        return [
            (i.name, axis, d.dim_param)
            for i in self.inputs
            for axis, d in enumerate(i.type.tensor_type.shape.dim)
            if not (d.HasField("dim_value") and d.dim_value >= 0)
        ]


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (i.name for i in graph.input)
    yield from (t.name for t in graph.initializer)
    yield from (t.values.name for t in graph.sparse_initializer)
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _names(inner)


def dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """A sparse weight with its zeros."""
    import onnx

    values, places = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    sizes = tuple(sparse.dims)
    made: Any = np.zeros(sizes, values.dtype)
    made[tuple(places.T) if places.ndim == 2 else np.unravel_index(places, sizes)] = values
    return onnx.numpy_helper.from_array(made, sparse.values.name)
