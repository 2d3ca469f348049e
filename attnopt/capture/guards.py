"""Constraints between the input sizes of a captured program: torch's guards, as text that can be parsed and printed.

A model that checks its input sizes ("is the length even?") is captured with the answers for the example.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from attnopt.base.sizes import is_static
from attnopt.capture.size_algebra import told_once
from attnopt.graph.evaluate import bounds
from attnopt.graph.nodes import input_axes, input_name, inputs_of


def relations(
    program: ExportedProgram, forward: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[str, ...]:
    """Python expressions in which ``x[1]`` is the length of the input ``x`` along axis 1, beyond what static axes and axes of
    the same symbol imply.  ``args`` and ``kwargs`` are those of ``forward`` at capture."""
    inputs = user_inputs(program)
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    paths = ["L" + pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(dict(bound))]
    named = _Named(dict(zip(paths, inputs, strict=True)), inputs)
    found = [text for code in program._guards_code if (text := named.read(code)) is not None]
    known = _bounds(inputs)
    return (*_told(known), *told_once(found, known))


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of all that the program is called with, in its order; ``meta["val"]`` of a constant is the constant."""
    named = {n.name: n for n in inputs_of(program.graph)}
    return [named[s.arg.name] for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]


def _axes(inputs: list[fx.Node]) -> Iterator[tuple[fx.Node, int, torch.SymInt]]:
    for _, n, axis, size in input_axes(inputs):
        if isinstance(size, torch.SymInt) and not is_static(size):
            yield n, axis, size


def _bounds(inputs: list[fx.Node]) -> dict[str, tuple[int, int | None]]:
    """The range of sizes for which the graph is valid, for the first axis of each."""
    found: dict[str, tuple[int, int | None]] = {}
    seen = set[sympy.Expr]()
    for n, axis, size in _axes(inputs):
        if size.node.expr not in seen:
            seen.add(size.node.expr)
            found[f"{input_name(n)}[{axis}]"] = least(size), bounds(size)[1]
    return found


def least(size: torch.SymInt) -> int:
    """torch says of every symbol that it is at least 2, which is no bound of a graph that computes the same for 1."""
    expr = size.node.expr
    lower = {s: known if (known := bounds(size, s)[0]) > 2 else 1 for s in expr.free_symbols}
    return min(bounds(size)[0], int(expr.subs(lower)))


def _told(known: Mapping[str, tuple[int, int | None]]) -> Iterator[str]:
    for axis, (lower, upper) in known.items():
        if lower > 2:
            yield f"{axis} >= {lower}"
        if upper is not None:
            yield f"{axis} <= {upper}"


class _Named(ast.NodeTransformer):
    """Replaces torch's names of input sizes by input names and axis numbers; axes with the same symbol get the same name."""

    def __init__(self, of_path: Mapping[str, fx.Node], inputs: list[fx.Node]) -> None:
        self.of_path, self.inputs = of_path, inputs
        self.first: dict[sympy.Expr, tuple[str, int]] = {}
        for n, axis, size in _axes(inputs):
            self.first.setdefault(size.node.expr, (input_name(n), axis))

    def read(self, code: str) -> str | None:
        """None if there is no statement about sizes."""
        tree = self.visit(ast.parse(code.strip(), mode="eval")).body
        numbers = {input_name(n) for n in self.of_path.values()}
        is_about_sizes = any(
            isinstance(n, ast.Subscript) or (isinstance(n, ast.Name) and n.id in numbers) for n in ast.walk(tree)
        )
        return ast.unparse(tree) if is_about_sizes else None

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        match node:
            case ast.Subscript(ast.Call(ast.Attribute(path, "size"), [], []), ast.Constant(int(axis))):
                n = self.of_path.get(ast.unparse(path)) or self._by_place(path)
                if n is not None:
                    return self._axis(n, axis)
        number = self.of_path.get(ast.unparse(node))
        return node if number is None else ast.Name(input_name(number), ast.Load())

    def _by_place(self, path: ast.expr) -> fx.Node | None:
        """An input as strict tracing calls it."""
        match path:
            case ast.Subscript(ast.Subscript(ast.Name("L"), ast.Constant("flat_args")), ast.Constant(int(place))):
                return self.inputs[place] if place < len(self.inputs) else None
        return None

    def _axis(self, n: fx.Node, axis: int) -> ast.expr:
        size = n.meta["val"].shape[axis]
        if is_static(size):
            return ast.Constant(int(size))
        name, first = self.first[size.node.expr]
        return ast.Subscript(ast.Name(name, ast.Load()), ast.Constant(first), ast.Load())
