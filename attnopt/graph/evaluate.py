"""Evaluating the subgraph of a mask or a number at any input sizes."""

from __future__ import annotations

from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor, fx

from attnopt.base.sizes import hint, is_static
from attnopt.graph.interpreter import Interpreter
from attnopt.graph.nodes import (
    ancestors,
    calls,
    constant_of,
    input_axes,
    input_name,
    inputs_of,
    is_number,
    is_state,
    value,
    with_values,
)
from attnopt.graph.ops import Kind, is_random, of

Number = TypeVar("Number")
Sizes = dict[sympy.Symbol, int]  # the graph's symbols, each with a number
_HEAVY = of(Kind.PRODUCT, Kind.CONVOLUTION, Kind.EMBEDDING, Kind.NORM, Kind.SOFTMAX, Kind.LOG_SOFTMAX, Kind.ATTENTION)


def is_heavy(node: fx.Node) -> bool:
    """It computes activations: a product, a norm or an attention, unlike masks and index arithmetic."""
    return calls(node, _HEAVY)


def inputs_behind(node: fx.Node) -> set[fx.Node]:
    """The inputs, and the state that calls leave, whose values (not merely sizes) ``node`` depends on."""
    known = node.meta.get(_INPUTS)
    if known is None:
        _note_inputs(node)
        known = node.meta[_INPUTS]
    return set(known)


_INPUTS = "attnopt.inputs"  # remembered on the nodes: a graph that only grows keeps its answers


def _note_inputs(node: fx.Node) -> None:
    stack = [node]
    while stack:
        n = stack[-1]
        above = [] if is_number(n) else [i for i in n.all_input_nodes if _INPUTS not in i.meta]
        if above:
            stack.extend(above)
            continue
        stack.pop()
        own = {n} if n.op == "placeholder" or is_state(n) else set()
        n.meta[_INPUTS] = frozenset(
            own.union(*(i.meta[_INPUTS] for i in n.all_input_nodes)) if not is_number(n) else own
        )


def is_plain(node: fx.Node) -> bool:
    """``node`` depends only on index arithmetic and constants: cheap to run, and the same at every call.

    A parameter is not a constant, whatever its value: a bias table of zeros may still be trained.  Nor is a buffer on the
    meta device, which has no values yet.
    """
    return not any(_is_varying(n) for n in ancestors(node, stop=is_number))


def _is_varying(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return constant_of(node) is None
    return is_heavy(node) or is_random(node.target)


def size_at(size: Number | torch.SymInt, sizes: Sizes) -> Number | int:
    """A size, or another number computed from sizes, with the graph's symbols at ``sizes``."""
    return int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else size


def symbols(graph: fx.Graph) -> Sizes:
    """Every symbol of the graph's sizes with its example value."""
    sizes = _sizes(graph)
    found = {s.node.expr: hint(s) for s in sizes if s.node.expr.is_symbol}
    for s in sizes:
        for symbol in s.node.expr.free_symbols - found.keys():  # if only a multiple of it is a size
            solved = sympy.solve(s.node.expr.subs(found) - hint(s), symbol)
            if len(solved) == 1 and solved[0].is_Integer:
                found[symbol] = int(solved[0])
    return found


def within(graph: fx.Graph, sizes: Sizes) -> Sizes:
    """These sizes of the graph's symbols, clamped to the bounds of its validity."""
    found = dict(sizes)
    for s in _sizes(graph):
        for symbol in s.node.expr.free_symbols & found.keys():
            lower, upper = bounds(s, symbol)
            found[symbol] = max(lower, found[symbol] if upper is None else min(upper, found[symbol]))
    return found


def _sizes(graph: fx.Graph) -> list[torch.SymInt]:
    """The inputs' sizes that are not fixed."""
    found = map(value, inputs_of(graph))
    sizes = [s for val in found for s in (val.shape if isinstance(val, Tensor) else (val,))]
    return [s for s in sizes if isinstance(s, torch.SymInt) and s.node.expr.free_symbols]


def bounds(size: torch.SymInt, of: sympy.Expr | None = None) -> tuple[int, int | None]:
    """The range of ``size``, or of a symbol of it, for which a graph is valid; None for an open end."""
    known = size.node.shape_env.bound_sympy(size.node.expr if of is None else of)
    lower, upper = (int(b) if getattr(b, "is_Integer", False) else None for b in (known.lower, known.upper))
    return lower or 0, upper


def dynamic_axes(graph: fx.Graph) -> set[tuple[str, int]]:
    """The input axes whose size may vary, by the input's name."""
    return {(input_name(n), axis) for _, n, axis, size in input_axes(inputs_of(graph)) if not is_static(size)}


def evaluate(gm: fx.GraphModule, node: fx.Node, sizes: Sizes, fill: float | None = None) -> Tensor:
    """The value of ``node`` with the graph's symbols at ``sizes``; placeholders are filled with ``fill``.

    Raises ValueError if an input value is needed and ``fill`` is None.
    """
    found = _AtSizes(gm, sizes, fill)(node)
    assert isinstance(found, Tensor)
    return found


class _AtSizes(Interpreter):
    """Numbers come from the sizes, and inputs and state are filled."""

    def __init__(self, gm: fx.GraphModule, sizes: Sizes, fill: float | None) -> None:
        super().__init__(gm)
        self.sizes, self.fill = sizes, fill

    def leaf(self, node: fx.Node) -> Any:
        val = value(node)
        if isinstance(val, torch.SymInt):
            return size_at(val, self.sizes)
        if node.op != "placeholder" and not is_state(node):
            return super().leaf(node)
        if self.fill is None or not isinstance(val, Tensor):
            raise ValueError(f"depends on the input {node.name}")
        dims = [size_at(s, self.sizes) for s in val.shape]
        return torch.full(dims, self.fill, dtype=val.dtype, device=with_values(val.device))
