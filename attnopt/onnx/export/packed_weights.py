"""Quantized weights of a file, sliced where heads were removed: the stored numbers and their scales, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnopt.errors import ExportError
from attnopt.onnx.export.builder import Array
from attnopt.onnx.load.source import Source

if TYPE_CHECKING:
    import onnx

_ELEMENTWISE = ("Mul", "Add", "Sub", "Div", "Cast", "Identity")


class NotSliceableError(Exception):
    """The numbers are not a selection of those that the file stores."""


def places(whole: Array, part: Array) -> tuple[int, tuple[int, ...]]:
    """(axis, indices) of ``part`` in ``whole``.  Raises NotSliceableError."""
    if whole.ndim == part.ndim:
        for axis in range(whole.ndim):
            others = [n for a, n in enumerate(whole.shape) if a != axis]
            if others != [n for a, n in enumerate(part.shape) if a != axis]:
                continue
            there: dict[bytes, int] = {}
            for i in range(whole.shape[axis]):
                there.setdefault(np.ascontiguousarray(whole.take(i, axis)).tobytes(), i)
            rows = [np.ascontiguousarray(part.take(i, axis)).tobytes() for i in range(part.shape[axis])]
            if all(row in there for row in rows):
                return axis, tuple(there[row] for row in rows)
    raise NotSliceableError


class Slices:
    """Nodes that make parts of packed weights, as the file's own nodes make the whole."""

    def __init__(self, source: Source, prefix: str) -> None:
        self.source, self.prefix = source, prefix
        self.made_by = {o: n for n in source.nodes for o in n.output}
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}

    def take(self, name: str, axis: int, index: Sequence[int], out: str | None = None) -> str:
        """The name of the value ``name`` sliced to these indices.  Raises NotSliceableError."""
        import onnx

        if name in self.source.constants:
            return self._constant(name, axis, index)
        node = self.made_by[name]
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.name = ""
        made.input[:] = self._inputs(node, axis, index)
        made.output[0] = out or f"{self.prefix}{name}"
        self.nodes.append(made)
        return str(made.output[0])

    def _inputs(self, node: onnx.NodeProto, axis: int, index: Sequence[int]) -> list[str]:
        import onnx

        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        rank = self._rank(node.output[0])
        if node.op_type in _ELEMENTWISE:
            return [self.take(name, axis - rank + self._rank(name), index) for name in node.input]
        if node.op_type == "Transpose":
            order = attributes.get("perm") or list(reversed(range(rank)))
            return [self.take(node.input[0], order[axis], index)]
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node, attributes, rank, axis, index)
        raise NotSliceableError

    def _dequantized(
        self, node: onnx.NodeProto, attributes: dict[str, Any], rank: int, axis: int, index: Sequence[int]
    ) -> list[str]:
        stored, *others = node.input
        block, along = attributes.get("block_size", 0), attributes.get("axis", 1) % rank
        first = self.take(stored, axis, index)
        if block and axis == along:
            blocks = [i // block for i in index[::block]]
            if [b * block + i for b in blocks for i in range(block)] != list(index):
                raise NotSliceableError
            return [first, *(self.take(name, axis, blocks) if name else "" for name in others)]
        if block:
            return [first, *(self.take(name, axis, index) if name else "" for name in others)]
        at = [(0 if axis == along and self._rank(name) == 1 else -1) if name else -1 for name in others]
        return [
            first,
            *(self.take(name, a, index) if name and a == 0 else name for name, a in zip(others, at, strict=True)),
        ]

    def _array(self, name: str) -> Array:
        import onnx

        if name in self.source.weights:
            return onnx.numpy_helper.to_array(self.source.weights[name])
        return onnx.numpy_helper.to_array(self.source.constant_nodes[name].attribute[0].t)

    def _rank(self, name: str) -> int:
        if name in self.source.constants:
            return int(self._array(name).ndim)
        node = self.made_by[name]
        return (
            max(self._rank(n) for n in node.input if n) if node.op_type in _ELEMENTWISE else self._rank(node.input[0])
        )

    def _constant(self, name: str, axis: int, index: Sequence[int]) -> str:
        import onnx

        array = self._array(name)
        if axis < 0 or (array.shape[axis] == 1 and tuple(index) != (0,)):
            return name  # one for all indices
        made = f"{self.prefix}{name}"
        part = onnx.numpy_helper.from_array(np.ascontiguousarray(np.take(array, list(index), axis)), made)
        if self.weights.setdefault(made, part) != part:
            made = f"{made}_{len(self.weights)}"
            part.name = made
            self.weights[made] = part
        return made


def refuse(name: str) -> ExportError:
    return ExportError(
        f"the weight {name!r} is quantized, and the rewrite is not a selection of its values",
        hint="use a pass that only removes heads, or rewrite the file before quantization",
    )
