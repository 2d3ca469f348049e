"""What has to hold between the sizes of a captured program's inputs: torch's guards, as text that can be read and written.

A model that asks for its inputs' sizes ("is the length even?") is captured with the answers that the example gave.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from attnopt.graph import is_static
from attnopt.probing import bounds


def relations(
    program: ExportedProgram, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """Python expressions in which ``x[1]`` is the length of the input ``x`` along axis 1, beyond what fixed axes and axes of
    one symbol say by themselves.  ``forward`` is called with ``args`` and ``kwargs`` as the program was captured."""
    inputs = user_inputs(program)
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    paths = ["L" + pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(dict(bound))]
    named = _Named(dict(zip(paths, inputs, strict=True)), inputs)
    found = [text for code in program._guards_code if (text := named.read(code)) is not None]
    return tuple(dict.fromkeys((*_bounds(inputs), *found)))


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of all that the program is called with, in its order; ``meta["val"]`` of a constant is the constant."""
    named = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    return [named[s.arg.name] for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]


def _axes(inputs: list[fx.Node]) -> Iterator[tuple[fx.Node, int, torch.SymInt]]:
    for n in inputs:
        val = n.meta.get("val")
        for axis, size in enumerate(val.shape if isinstance(val, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                yield n, axis, size


def _bounds(inputs: list[fx.Node]) -> Iterator[str]:
    seen = set[Any]()
    for n, axis, size in _axes(inputs):
        if size.node.expr not in seen:
            seen.add(size.node.expr)
            lower, upper = bounds(size)
            if lower > 2:  # below, torch itself makes no difference
                yield f"{n.name}[{axis}] >= {lower}"
            if upper is not None:
                yield f"{n.name}[{axis}] <= {upper}"


def _same(left: ast.expr, right: ast.expr) -> bool:
    """Equal whatever the sizes are: torch 2.11 says of each broadcast that ``min(6 * n, 24 * n) == 6 * n``."""
    if ast.dump(left) == ast.dump(right):
        return True
    found = _worked_out(left)
    return found is not None and bool(found == _worked_out(right))


def _worked_out(node: ast.expr) -> sympy.Expr | None:
    """Sums, products, minima and maxima of sizes, which are positive; None for all else."""
    match node:
        case ast.Constant(int(number)):
            return sympy.Integer(number)
        case ast.Subscript():
            return sympy.Symbol(ast.unparse(node), integer=True, positive=True)
        case ast.Name(name):
            return sympy.Symbol(name, integer=True, nonnegative=True)
        case ast.BinOp(left, ast.Add() | ast.Mult() as how, right):
            parts = [_worked_out(left), _worked_out(right)]
            made = sympy.Add if isinstance(how, ast.Add) else sympy.Mul
        case ast.Call(ast.Name("min" | "max" as name), given, []):
            parts = [_worked_out(g) for g in given]
            made = sympy.Min if name == "min" else sympy.Max
        case _:
            return None
    return None if None in parts else made(*parts)


class _Named(ast.NodeTransformer):
    """Puts names and numbers of axes in the place of what torch calls the inputs' sizes; axes of one symbol get one name."""

    def __init__(self, of_path: Mapping[str, fx.Node], inputs: list[fx.Node]) -> None:
        self.of_path = of_path
        self.first: dict[Any, tuple[str, int]] = {}
        for n, axis, size in _axes(inputs):
            self.first.setdefault(size.node.expr, (n.name, axis))

    def read(self, code: str) -> str | None:
        """None where nothing is said that could fail."""
        tree = self.visit(ast.parse(code.strip(), mode="eval")).body
        match tree:
            case ast.Compare(left, [ast.Eq()], [right]) if _same(left, right):
                return None
        numbers = {n.name for n in self.of_path.values()}
        is_about_sizes = any(
            isinstance(n, ast.Subscript) or (isinstance(n, ast.Name) and n.id in numbers) for n in ast.walk(tree)
        )
        return ast.unparse(tree) if is_about_sizes else None

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        match node:
            case ast.Subscript(ast.Call(ast.Attribute(path, "size"), [], []), ast.Constant(int(axis))):
                n = self.of_path.get(ast.unparse(path))
                if n is not None:
                    return self._axis(n, axis)
        number = self.of_path.get(ast.unparse(node))
        return node if number is None else ast.Name(number.name, ast.Load())

    def _axis(self, n: fx.Node, axis: int) -> ast.expr:
        size = n.meta["val"].shape[axis]
        if is_static(size):
            return ast.Constant(int(size))
        name, first = self.first[size.node.expr]
        return ast.Subscript(ast.Name(name, ast.Load()), ast.Constant(first), ast.Load())
