"""Size constraints as checks in the file: outside them, its results would differ from the model.

ONNX has no assertion.  A Gather from one element at index 0 or 1 is one: ONNX Runtime stops there and names the node.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from attnopt.errors import ExportError
from attnopt.onnx.export.builder import Builder

_OPERATORS = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Mod: "Mod"}
_COMPARISONS = {
    ast.Eq: "Equal", ast.Lt: "Less", ast.LtE: "LessOrEqual", ast.Gt: "Greater", ast.GtE: "GreaterOrEqual",
}  # fmt: skip
_FUNCTIONS = {"max": "Max", "min": "Min"}


def check_sizes(graph: ir.Graph, relations: Sequence[str]) -> None:
    """Make the file fail with the name of a violated relation.  Raises ExportError if ONNX cannot express it."""
    inputs = {str(i.name): i for i in graph.inputs}
    for number, text in enumerate(relations):
        tree = ast.parse(text, mode="eval").body
        about = list(_inputs_of(tree))
        if not inputs.keys() >= set(about):
            continue  # the file does not take inputs that the graph does not use
        b = Builder(graph, f"sizes_{number}")
        try:
            holds = _written(b, inputs, tree)
        except (KeyError, TypeError) as e:
            raise ExportError(
                f"the graph is valid only where {text}, which an ONNX file cannot check",
                hint="remove these axes from dynamic_shapes",
            ) from e
        zero = b.op("Gather", b.ints(0), b.op("Cast", b.op("Not", holds), to=ir.DataType.INT64))
        b.nodes[-1].name = f"requires {text}"
        _needed_for(b, graph, inputs[about[0]], zero)


def _inputs_of(tree: ast.AST) -> Iterator[str]:
    match tree:
        case ast.Subscript(ast.Name(name), ast.Constant(int())) | ast.Name(name):  # a size, and a number
            yield name
        case ast.Subscript() | ast.Attribute():
            return
        case ast.Call(_, parts):
            for part in parts:
                yield from _inputs_of(part)
        case _:
            for child in ast.iter_child_nodes(tree):
                yield from _inputs_of(child)


def _written(b: Builder, inputs: dict[str, ir.Value], node: ast.expr) -> ir.Value:
    """An int64 or bool scalar.  KeyError, TypeError: ONNX has no such operator on integers."""

    def of(part: ast.expr) -> ir.Value:
        return _written(b, inputs, part)

    match node:
        case ast.Constant(int(value)):
            return b.number(value)
        case ast.Subscript(ast.Name(name), ast.Constant(int(axis))):
            return b.op("Squeeze", b.size(inputs[name], axis))
        case ast.Name(name):
            return b.op("Squeeze", inputs[name])
        case ast.UnaryOp(ast.USub(), operand):
            return b.op("Neg", of(operand))
        case ast.UnaryOp(ast.Not(), operand):
            return b.op("Not", of(operand))
        case ast.BinOp(left, ast.FloorDiv(), right):
            x, y = of(left), of(right)  # ONNX's division of integers cuts toward zero; its Mod has the divisor's sign
            return b.op("Div", b.op("Sub", x, b.op("Mod", x, y)), y)
        case ast.BinOp(left, how, right):
            return b.op(_OPERATORS[type(how)], of(left), of(right))
        case ast.Compare(left, [ast.NotEq()], [right]):
            return b.op("Not", b.op("Equal", of(left), of(right)))
        case ast.Compare(left, [how], [right]):
            return b.op(_COMPARISONS[type(how)], of(left), of(right))
        case ast.BoolOp(how, [first, *rest]):
            made = of(first)
            for part in rest:
                made = b.op("And" if isinstance(how, ast.And) else "Or", made, of(part))
            return made
        case ast.Call(ast.Name(function), parts):
            return b.op(_FUNCTIONS[function], *map(of, parts))
    raise TypeError(ast.dump(node))


def _needed_for(b: Builder, graph: ir.Graph, x: ir.Value, zero: ir.Value) -> None:
    """Nothing that reads ``x`` runs before the check: ``zero`` is added to it."""
    assert x.dtype is not None
    asking = ("Shape",) if x.shape is None or len(x.shape) else ("Squeeze",)  # of a size, and of a number
    users = [(node, place) for node, place in x.uses() if node.op_type not in asking]
    made = b.op("Or" if x.dtype == ir.DataType.BOOL else "Add", x, b.op("Cast", zero, to=x.dtype))
    made.shape, made.type = x.shape, x.type
    for node, place in users:
        node.replace_input_with(place, made)
    graph.insert_before(graph[0], b.nodes)
