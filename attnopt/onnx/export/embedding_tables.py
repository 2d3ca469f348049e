"""Embedding tables in int8: rows with a scale each, read by the same Gather.

ONNX Runtime's dynamic quantizer gives a whole table one scale; rows of rare tokens are small beside its largest number.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as irc

from attnopt.onnx.export.builder import Array, Builder, is_a

LEAST_SHARE = 0.01  # of the weights; smaller tables save nothing to speak of
MOST = 127
ROWS = 4096  # rounded at a time: a copy of a whole table may not fit beside it
CORES = ("Softmax", "Attention", "RotaryEmbedding")


def quantize_tables(model: ir.Model, chosen: Collection[str]) -> int:
    """Store float32 tables that only Gather reads along axis 0 in int8, and tell how many.

    A table whose rows reach an attention without one of the ``chosen`` products between stays in float: it holds positions.
    """
    graph = model.graph
    whole = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
    count = 0
    for name, table in list(graph.initializers.items()):
        stored = _rows_of(table)
        if stored is None or stored.nbytes < LEAST_SHARE * whole:
            continue
        readers = [node for node, _ in table.uses()]
        if any(_reaches_attention(node, chosen) for node in readers):
            continue
        found = _by_rows(stored.numpy())
        if found is not None:
            count += 1
            _replace(graph, name, readers, *found)
            del graph.initializers[name]
    return count


def _rows_of(value: ir.Value) -> ir.TensorProtocol | None:
    """What is stored, if it is a matrix that is only read by rows."""
    stored = value.const_value
    if stored is None or stored.dtype != ir.DataType.FLOAT or len(stored.shape) != 2:
        return None
    if value.is_graph_input() or value.is_graph_output() or not value.uses():
        return None
    return stored if all(_reads_rows(node, value.graph) and place == 0 for node, place in value.uses()) else None


def _reads_rows(node: ir.Node, graph: ir.Graph | None) -> bool:
    return is_a(node, "Gather") and node.graph is graph and node.attributes.get_int("axis", 0) == 0


def _reaches_attention(node: ir.Node, chosen: Collection[str]) -> bool:
    """Whether what it computes gets into the middle of an attention, or of anything that cannot be told from one."""
    seen, left = {node}, [node]
    while left:
        for reader in {reader for output in left.pop().outputs for reader, _ in output.uses()}:
            if reader in seen or reader.name in chosen:
                continue
            if reader.graph is not node.graph or _may_be_attention(reader):
                return True
            seen.add(reader)
            left.append(reader)
    return False


def _may_be_attention(node: ir.Node) -> bool:
    if is_a(node, "MatMul", "Einsum", "Gemm"):
        return sum(value is not None and value.const_value is None for value in node.inputs) > 1
    return node.op_type.endswith(CORES) or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())


def _by_rows(table: Array) -> tuple[Array, Array] | None:
    """int8 [V, C] and scales [V, 1] of float32 [V, C]; None if it has NaN or infinities."""
    small, scales = np.empty(table.shape, np.int8), np.empty((len(table), 1), np.float32)
    for first in range(0, len(table), ROWS):
        rows = table[first : first + ROWS]
        largest = np.abs(rows).max(1, keepdims=True)
        if not np.isfinite(largest).all():
            return None
        scale = np.maximum(largest / MOST, np.finfo(np.float32).tiny)
        scales[first : first + ROWS] = scale
        small[first : first + ROWS] = np.rint(rows / scale)
    return small, scales


def _replace(graph: ir.Graph, name: str, readers: Collection[ir.Node], small: Array, scales: Array) -> None:
    build = Builder(graph, f"{name}/int8")
    held, factors = build.constant(small), build.constant(scales)
    for node in readers:
        build.nodes.clear()
        rows = build.op("Cast", build.op("Gather", held, node.inputs[1]), to=ir.DataType.FLOAT.value)
        made, out = build.op("Mul", rows, build.op("Gather", factors, node.inputs[1])), node.outputs[0]
        irc.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [made])
