"""Constant folding of quantized weights: weights that the file dequantizes with its own nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnopt.onnx.load.grouping import used_by
from attnopt.onnx.load.source import Source
from attnopt.onnx.load.values import Known

_STEPS = {
    "Cast",
    "DequantizeLinear",
    "Mul",
    "Sub",
    "Add",
    "Div",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Identity",
}


@dataclass(frozen=True)
class Folded:
    """``values``: the results of ``nodes``, which read only constants, that the rest of the graph uses."""

    values: dict[str, Known] = field(default_factory=dict)
    nodes: frozenset[int] = frozenset()


def folded(source: Source, feed: Mapping[str, Known]) -> Folded:
    """Weights that come out of a cast or of a dequantization, as ONNX Runtime computes them."""
    from attnopt.onnx.load.unread import Runs

    made: dict[str, int] = {}
    wide: set[str] = set()
    for i, node in enumerate(source.nodes):
        if node.op_type not in _STEPS or node.domain not in ("", "ai.onnx", "com.microsoft") or len(node.output) != 1:
            continue
        reads = used_by(node)
        if reads and all(n in source.constants or n in made for n in reads):
            made[node.output[0]] = i
            if (node.op_type in ("Cast", "DequantizeLinear") and _is_matrix(source, node.input[0])) or wide & set(
                reads
            ):
                wide.add(node.output[0])
    cones = {made[n] for n in wide}
    for i in sorted(cones, reverse=True):
        cones |= {made[n] for n in used_by(source.nodes[i]) if n in made and set(_readers(source, n)) <= cones}
    ends = [n for n in wide if set(_readers(source, n)) - cones or n in source.outputs]
    if not ends:
        return Folded()
    return Folded(Runs(source, (feed,)).values(ends)[0], frozenset(cones))


def _readers(source: Source, name: str) -> list[int]:
    return [i for i, node in enumerate(source.nodes) if name in used_by(node)]


def _is_matrix(source: Source, name: str) -> bool:
    stored = source.weights.get(name)
    if stored is None and name in source.constant_nodes:
        stored = next((a.t for a in source.constant_nodes[name].attribute if a.name == "value"), None)
    return stored is not None and len(stored.dims) >= 2
