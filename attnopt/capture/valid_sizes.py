"""The sizes for which a captured graph is valid: its symbols at other numbers than the example's."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor, fx

from attnopt.base.sizes import is_static
from attnopt.capture.second_example import Place
from attnopt.graph.evaluate import Sizes, bounds, symbols
from attnopt.graph.nodes import fake_mode, input_axes, input_name, inputs_of, is_tensor

if TYPE_CHECKING:
    from attnopt.capture.dynamic_axes import Asked
    from attnopt.capture.program import Program


def settle_sizes(module: fx.GraphModule) -> None:
    """A requested dynamic size that became static during tracing is an ordinary number."""
    mode = fake_mode(module.graph)
    for node in module.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor) and any(isinstance(s, torch.SymInt) and is_static(s) for s in val.shape):
            sizes, strides = ([int(s) if is_static(s) else s for s in given] for given in (val.shape, val.stride()))
            with mode:
                node.meta["val"] = torch.empty_strided(sizes, strides, dtype=val.dtype, device=val.device)


def without_pinned(program: Program, asked: Asked) -> Program:
    """Sizes for which only the example's number is valid, as of ``s // 2 == 1`` with ``s % 2 == 0``, as numbers.

    torch finds some of them only when it traces once more, as lowering does.
    """
    stuck = cannot_vary(program)
    if not stuck:
        return program
    for place, _, axis, size in input_axes(inputs_of(program.module.graph)):
        if (place, axis) in stuck:
            int(size)  # torch records that it is this number
    settle_sizes(program.module)
    return program.told(asked)


def cannot_vary(program: Program) -> set[Place]:
    """Axes with a symbol for which no other length, among many tried, satisfies the constraints."""
    graph = program.module.graph
    sizes, fits = symbols(graph), sizes_that_fit(graph, program.fixed_axes)
    stuck = {s for s in sizes if not any(fits(new) for new in other_sizes(sizes, s))}
    return {
        (place, axis)
        for place, _, axis, size in input_axes(inputs_of(graph))
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & stuck
    }


def sizes_that_fit(graph: fx.Graph, held: Sequence[str]) -> Callable[[Sizes], bool]:
    """Whether sizes of the graph's symbols satisfy their bounds and the constraints between them, as the report lists them."""
    inputs = list(filter(is_tensor, inputs_of(graph)))
    predicates = _predicates(held, inputs)
    axes = [size for _, _, _, size in input_axes(inputs) if isinstance(size, torch.SymInt)]
    limits = {size.node.expr: bounds(size) for size in axes if size.node.expr.is_symbol}

    def fits(new: Sizes) -> bool:
        for symbol, (lower, upper) in limits.items():
            if new[symbol] < max(1, lower) or (upper is not None and new[symbol] > upper):
                return False
        named = {input_name(n): _shape(n, new) for n in inputs}
        return all(
            eval(code, {"__builtins__": {}, "_min": min, "_max": max}, named) for code in predicates
        )  # torch's guards

    return fits


def _shape(node: fx.Node, sizes: Sizes) -> tuple[int, ...]:
    return tuple(s if isinstance(s, int) else int(s.node.expr.subs(sizes)) for s in node.meta["val"].shape)


def _predicates(texts: Sequence[str], inputs: Sequence[fx.Node]) -> list[CodeType]:
    """The relations that involve only input sizes, ready for evaluation."""
    known = {input_name(n) for n in inputs} | {"_min", "_max"}
    trees = [
        ast.fix_missing_locations(_Calls().visit(ast.parse(t, mode="eval")))
        for t in texts
        if not re.fullmatch(r"\w+\[\d+\] = \d+", t)
    ]
    return [
        compile(tree, "sizes", "eval")
        for tree in trees
        if {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} <= known
        and not any(isinstance(n, ast.Attribute) for n in ast.walk(tree))
    ]


class _Calls(ast.NodeTransformer):
    """min and max under names that no input has."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        match node.func:
            case ast.Name("min" | "max" as name):
                return ast.Call(ast.Name(f"_{name}", ast.Load()), node.args, node.keywords)
        return node


def other_sizes(sizes: Sizes, symbol: sympy.Symbol) -> Iterator[Sizes]:
    """Sizes that change the symbol: alone, with one other symbol, and with all."""
    n = sizes[symbol]
    steps = [d for k in (1, 2, 3, 4, 6, 8, 12, 14, 16, 24, 28, 32, 48, 64, 128) for d in (k, -k)]
    for new in (*(n + d for d in steps), 2 * n, 3 * n, 4 * n, n // 2):
        if new != n:
            yield {**sizes, symbol: new}
    for factor in (2, 3):
        yield {s: factor * m for s, m in sizes.items()}
        for other in sizes:
            yield {**sizes, symbol: factor * n, other: factor * sizes[other]}
    for step in steps:
        for other in sizes:
            yield {**sizes, symbol: n + step, other: sizes[other] + step}
