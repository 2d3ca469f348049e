"""Writing ONNX nodes: constants are stored once per model, known sizes are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from attnopt.onnx.export.choose_form import WITH_ATTENTION

ORT = "com.microsoft"
Array: TypeAlias = NDArray[np.generic]
Attribute: TypeAlias = "int | float | str | Sequence[int] | ir.Graph | None"


class Builder:
    """Collects nodes for one graph, or for the body of a loop inside it.  All values are named after ``prefix``."""

    def __init__(self, graph: ir.Graph, prefix: str, outer: Builder | None = None, opset: int = WITH_ATTENTION) -> None:
        self.graph, self.prefix, self.outer, self.opset = graph, prefix, outer, opset
        self.nodes: list[ir.Node] = []
        self._count = 0
        self._sizes: dict[tuple[ir.Value, int], ir.Value] = {}

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Attribute
    ) -> ir.Value:
        """A node, of which only the first output is used, without attributes that are None."""
        given = {name: value for name, value in attributes.items() if value is not None}
        node = ir.node(op_type, inputs, given, domain=domain, num_outputs=outputs, name=self.name(op_type))
        for output in node.outputs:
            output.name = self.name(op_type)
        self.nodes.append(node)
        return node.outputs[0]

    def name(self, of: str) -> str:
        """A unique name in the model."""
        self._count += 1
        return f"{self.prefix}/{of}_{self._count}"

    def body(self) -> Builder:
        """For the body of a loop in this graph, which may use this graph's values."""
        return Builder(self.graph, self.name("block"), outer=self, opset=self.opset)

    def constant(self, array: Array) -> ir.Value:
        """An initializer of the outermost graph; equal arrays are one."""
        name = f"attnopt_{array.dtype}_{'x'.join(map(str, array.shape))}_{_digest(array)}"
        if name not in self.graph.initializers:
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.tensor(array, name=name),
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def ints(self, *numbers: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.constant(np.asarray(numbers, np.int64))

    def number(self, value: int) -> ir.Value:
        """An int64 constant without axes."""
        return self.constant(np.asarray(value, np.int64))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The length of an axis, as a 1-D tensor of one number."""
        if self.outer is not None and value.producer() not in self.nodes:
            return self.outer.size(value, axis)
        key = (value, axis)
        if key not in self._sizes:
            self._sizes[key] = self.op("Shape", value, start=axis, end=axis + 1)
        return self._sizes[key]

    def slice(self, value: ir.Value, start: ir.Value, stop: ir.Value, axis: int) -> ir.Value:
        return self.op("Slice", value, start, stop, self.ints(axis))

    def arange(self, start: ir.Value, stop: ir.Value) -> ir.Value:
        """``start`` and ``stop`` are 1-D tensors of one number."""
        return self.op("Range", self.op("Squeeze", start), self.op("Squeeze", stop), self.number(1))

    def swapped(self, value: ir.Value) -> ir.Value:
        """Axes 1 and 2 of four swapped; a swap that produced ``value`` is undone."""
        source = before_swap(value)
        return self.op("Transpose", value, perm=SWAP) if source is None else source


SWAP = [0, 2, 1, 3]
SWAPPED = "_by_token"  # name suffix of an attention output before heads and tokens are swapped


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of one of these standard operators that produces ``value``."""
    node = None if value is None else value.producer()
    return node if node is not None and is_a(node, *op_types) else None


def is_a(node: ir.Node, *op_types: str) -> bool:
    return not node.domain and node.op_type in op_types


def is_swap(node: ir.Node) -> bool:
    """The node swaps axes 1 and 2 of four."""
    return is_a(node, "Transpose") and list(node.attributes["perm"].as_ints()) == SWAP


def before_swap(value: ir.Value) -> ir.Value | None:
    """``value`` before its axes 1 and 2 were swapped; None if they were not."""
    node = made_by(value, "Transpose")
    return node.inputs[0] if node is not None and is_swap(node) else None


def _digest(array: Array) -> str:
    from hashlib import sha1

    return sha1(np.ascontiguousarray(array).tobytes(), usedforsecurity=False).hexdigest()[:16]
