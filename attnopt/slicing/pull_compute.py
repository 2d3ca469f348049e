"""Selections moved up through operators that compute: projections, products, norms, and elementwise ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from attnopt.graph.nodes import (
    arg,
    aten,
    calls,
    is_call,
    is_tensor,
    operand,
    shape,
    wrap,
)
from attnopt.graph.ops import Kind, named, rules
from attnopt.graph.products import expand_equation
from attnopt.graph.select import Selection
from attnopt.slicing.selection import Demand, Pulled, aligned, is_weight, replaced


def elementwise(node: fx.Node, selection: Selection) -> Pulled:
    operands = list(dict.fromkeys(n for n in node.all_input_nodes if is_tensor(n)))
    ndim = len(shape(node))
    return Pulled(tuple((n, aligned(n, ndim, selection)) for n in operands), replaced(node, operands))


def _linear(node: fx.Node, selection: Selection) -> Pulled | None:
    x, w = arg(node, 0), arg(node, 1)
    bias = arg(node, 2)
    last = len(shape(node)) - 1
    if set(selection) - {last}:
        return None if last in selection else Pulled(((x, selection),), replaced(node, [x]), across=True)
    demands: list[Demand] = [(w, {0: selection[last]})]
    if is_tensor(bias):
        demands.append((bias, {0: selection[last]}))
    return Pulled(tuple(demands), lambda f: (node.target, (x, *f), {}), weights=frozenset(range(len(demands))))


def _addmm(node: fx.Node, selection: Selection) -> Pulled | None:
    bias, x, w = arg(node, 0), arg(node, 1), arg(node, 2)
    if set(selection) == {0}:
        return Pulled(((x, selection),), replaced(node, [x]), across=True)
    if set(selection) != {1}:
        return None
    below = aligned(bias, 2, selection)
    return Pulled(
        ((bias, below), (w, {1: selection[1]})),
        lambda f: (node.target, (f[0], x, f[1]), dict(node.kwargs)),
        weights=frozenset((0, 1)),
    )


def _matmul(node: fx.Node, selection: Selection) -> Pulled | None:
    a, b = arg(node, 0), arg(node, 1)
    n = len(shape(node))
    if len(shape(a)) < 2 or len(shape(b)) < 2:
        return None
    batch = {axis: idx for axis, idx in selection.items() if axis < n - 2}
    left, right = aligned(a, n, batch), aligned(b, n, batch)
    if n - 2 in selection:
        left[len(shape(a)) - 2] = selection[n - 2]
    if n - 1 in selection:
        right[len(shape(b)) - 1] = selection[n - 1]
    weights = frozenset(i for i, (x, s) in enumerate(((a, left), (b, right))) if s and is_weight(x))
    return Pulled(((a, left), (b, right)), replaced(node, [a, b]) if a is not b else None, weights, across=not weights)


def _einsum(node: fx.Node, selection: Selection) -> Pulled | None:
    equation, operands = arg(node, 0), arg(node, 1)
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    found = expand_equation(equation, tuple(len(shape(o)) for o in operands))
    if found is None:
        return None
    terms, out = found
    chosen = {out[a]: idx for a, idx in selection.items()}
    demands = tuple(
        (o, {t.index(c): idx for c, idx in chosen.items() if c in t and shape(o)[t.index(c)] != 1})
        for o, t in zip(operands, terms, strict=True)
    )
    weights = frozenset(i for i, (o, s) in enumerate(demands) if s and is_weight(o))
    return Pulled(demands, lambda f: (node.target, (equation, list(f)), {}), weights, across=not weights)


def _convolution(node: fx.Node, selection: Selection) -> Pulled | None:
    x, w = arg(node, 0), arg(node, 1)
    bias = arg(node, 2)
    groups = node.args[-1] if isinstance(node.args[-1], int) and len(node.args) >= 7 else 1
    if is_call(node, aten.convolution.default) and arg(node, 6):  # transposed
        return None
    if 1 not in selection:
        return Pulled(((x, selection),), replaced(node, [x]), across=True) if set(selection) == {0} else None
    if set(selection) != {1}:
        return None
    rows = selection[1]
    demands: list[Demand] = [(w, {0: rows})]
    if is_tensor(bias):
        demands.append((bias, {0: rows}))
    if groups == 1:
        operands = [w, bias] if is_tensor(bias) else [w]
        return Pulled(tuple(demands), replaced(node, operands), weights=frozenset(range(len(demands))))
    if groups != shape(x)[1] or groups != shape(node)[1]:
        return None
    depthwise = [*demands, (x, {1: rows})]

    def build(f: Sequence[fx.Node]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        args = [f[-1], *f[:-1], *node.args[len(f) :]] if is_tensor(bias) else [f[-1], f[0], *node.args[2:]]
        args[-1] = len(rows)
        return node.target, tuple(args), dict(node.kwargs)

    return Pulled(tuple(depthwise), build)


def _embedding(node: fx.Node, selection: Selection) -> Pulled | None:
    w = operand(node)
    last = len(shape(node)) - 1
    if set(selection) != {last}:
        return None
    return Pulled(((w, {1: selection[last]}),), replaced(node, [w]), weights=frozenset((0,)))


def _norm(node: fx.Node, selection: Selection) -> Pulled | None:
    """layer_norm and rms_norm: whole along the normalised axes."""
    x, normalized = arg(node, 0), arg(node, 1)
    first = len(shape(x)) - len(normalized)
    return None if any(a >= first for a in selection) else Pulled(((x, selection),), replaced(node, [x]))


def _batch_norm(node: fx.Node, selection: Selection) -> Pulled | None:
    operands = [n for n in node.all_input_nodes if is_tensor(n)]
    if arg(node, 5):  # training: statistics of the batch
        return None
    x = arg(node, 0)
    if set(selection) - {1}:
        return None
    demands = tuple((n, selection if n is x else {0: selection[1]}) for n in operands)
    return Pulled(demands, replaced(node, operands))


_NORMS = named("linalg_vector_norm norm")


def _reduction(node: fx.Node, selection: Selection) -> Pulled | None:
    x = arg(node, 0)
    position = 2 if calls(node, _NORMS) else 1
    dims = node.args[position] if len(node.args) > position else None
    if not is_tensor(x) or not isinstance(dims, (list, tuple, int)):
        return None
    n = len(shape(x))
    reduced = {wrap(int(d), n) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    kept = len(shape(node)) == n
    axes = [a for a in range(n) if kept or a not in reduced]
    below = {axes[a]: idx for a, idx in selection.items()}
    return None if set(below) & reduced else Pulled(((x, below),), replaced(node, [x]))


def _softmax(node: fx.Node, selection: Selection) -> Pulled | None:
    x = operand(node)
    at = wrap(arg(node, 1), len(shape(x)))
    return None if at in selection else Pulled(((x, selection),), replaced(node, [x]))


COMPUTE: dict[Any, Callable[[fx.Node, Selection], Pulled | None]] = rules(
    {
        "linear": _linear,
        "addmm": _addmm,
        "matmul bmm mm": _matmul,
        "einsum": _einsum,
        Kind.CONVOLUTION: _convolution,
        "embedding": _embedding,
        "layer_norm rms_norm": _norm,
        "batch_norm": _batch_norm,
        Kind.SOFTMAX: _softmax,
        Kind.LOG_SOFTMAX: _softmax,
        Kind.REDUCE: _reduction,
    }
)
