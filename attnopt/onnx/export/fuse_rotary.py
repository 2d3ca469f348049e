"""Rotary positions, ``x * cos + [-x2, x1] * sin`` with x1 and x2 the halves of x's features, as the one operator of ONNX."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attnopt.onnx.export.builder import Builder, is_a, made_by

KEEPING = ("Cos", "Sin", "Cast", "Neg", "Unsqueeze")  # equal halves stay equal, if the last axis stays the last
SCALING = ("Mul", "Div")


def fuse_rotations(graph: ir.Graph) -> None:
    """RotaryEmbedding for each rotation of float32 heads [B, H, L, D] whose tables are equal in both halves."""
    builder, tables = Builder(graph, "rotary"), dict[tuple[ir.Value, object], ir.Value]()
    for node in [n for n in graph if is_a(n, "Add")]:
        rotation = _rotation(node)
        if rotation is None:
            continue
        builder.nodes = []
        halves = [_half(builder, tables, table, rotation.x) for table in (rotation.cos, rotation.sin)]
        made, old = builder.op("RotaryEmbedding", rotation.x, *halves), node.outputs[0]
        made.shape, made.type = old.shape, old.type
        graph.insert_before(node, builder.nodes)
        ir.convenience.replace_all_uses_with(old, made)
        graph.remove(node, safe=True)


@dataclass(frozen=True)
class _Rotation:
    """``x`` [B, H, L, D]; the tables broadcast to [B, 1, L, D]."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value


def _rotation(add: ir.Node) -> _Rotation | None:
    if add.outputs[0].is_graph_output():
        return None
    for straight, turned in (add.inputs, add.inputs[::-1]):
        for there, sin in _factors(turned):
            x = _turned(there)
            for same, cos in _factors(straight):
                if x is not None and same is x and _is_table(cos, x) and _is_table(sin, x):
                    return _Rotation(x, cos, sin)
    return None


def _factors(product: ir.Value | None) -> list[tuple[ir.Value, ir.Value]]:
    """The two operands of a multiplication, in both orders."""
    node = made_by(product, "Mul")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return []
    a, b = node.inputs[0], node.inputs[1]
    return [(a, b), (b, a)]


def _turned(value: ir.Value) -> ir.Value | None:
    """The x of ``[-x2, x1]``."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"].as_int() not in (-1, 3):
        return None
    negated = made_by(joined.inputs[0], "Neg")
    low, high = made_by(joined.inputs[1], "Slice"), negated and made_by(negated.inputs[0], "Slice")
    x = low.inputs[0] if low is not None else None
    if low is None or not high or x is None or x is not high.inputs[0] or x.dtype != ir.DataType.FLOAT:
        return None
    if x.shape is None or len(x.shape) != 4 or any(isinstance(n, ir.SymbolicDim) and n.value is None for n in x.shape):
        return None
    size = x.shape[3]
    if not isinstance(size, int) or size % 2:
        return None
    return x if _cut(low, size) == (0, size // 2) and _cut(high, size) == (size // 2, size) else None


def _cut(node: ir.Node, size: int) -> tuple[int, int] | None:
    """Start and end of a slice along the last axis of four, which has this size."""
    said = [_number(value) for value in node.inputs[1:]]
    if len(said) != 4 or said[2] not in (-1, 3) or said[3] != 1 or said[0] is None or said[1] is None:
        return None
    start, end, _ = slice(said[0], said[1]).indices(size)
    return start, end


def _number(value: ir.Value | None) -> int | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return int(value.const_value.numpy().item())


def _is_table(table: ir.Value, x: ir.Value) -> bool:
    """One row for each token, the same for all heads, with equal halves."""
    if table.shape is None or x.shape is None or table.dtype != ir.DataType.FLOAT:
        return False
    batch, _, length, size = x.shape
    *lead, rows, columns = [1, 1, *table.shape][-4:]
    fits = lead[1] == 1 and lead[0] in (1, batch) and rows == length and columns == size
    return fits and len(table.shape) in (2, 3, 4) and _has_equal_halves(table)


def _has_equal_halves(table: ir.Value) -> bool:
    """Along the last axis."""
    if table.const_value is not None:
        array = table.const_value.numpy()
        half = array.shape[-1] // 2
        return bool((array[..., :half] == array[..., half:]).all())
    node = table.producer()
    if node is None or node.domain or table.shape is None:
        return False
    if node.op_type == "Concat":
        is_last = node.attributes["axis"].as_int() in (-1, len(table.shape) - 1)
        return is_last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    source = node.inputs[0]
    if node.op_type not in KEEPING and not (node.op_type in SCALING and _is_one_number(node.inputs[1])):
        return False
    if source is None or source.shape is None or not len(source.shape) or source.shape[-1] != table.shape[-1]:
        return False
    return _has_equal_halves(source)


def _is_one_number(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.size == 1


def _half(b: Builder, tables: dict[tuple[ir.Value, object], ir.Value], table: ir.Value, x: ir.Value) -> ir.Value:
    """[B, L, D / 2] of a table, once for all rotations that use it."""
    assert table.shape is not None
    assert x.shape is not None
    size = x.shape[3]
    assert isinstance(size, int)
    key = (table, x.shape[0])
    if key not in tables:
        half = b.op("Slice", table, b.ints(0), b.ints(size // 2), b.ints(-1))
        if len(table.shape) == 4:
            half = b.op("Squeeze", half, b.ints(1))
        if len(table.shape) != 4 or table.shape[0] != x.shape[0]:
            half = b.op("Expand", half, b.op("Concat", b.size(x, 0), b.ints(1, 1), axis=0))
        tables[key] = half
    return tables[key]
