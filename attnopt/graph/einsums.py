"""Einsums of several tensors as products of two, and those that only scale a tensor as multiplications."""

from __future__ import annotations

from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, is_tensor, shape
from attnopt.graph.products import expand_equation


def in_pairs(emit: Emitter, node: fx.Node) -> fx.Node | None:
    """From left to right, as torch computes it without a planner; None if nothing is gained."""
    equation, operands = node.args[0], node.args[1]
    if len(node.args) > 2 or node.kwargs or not isinstance(equation, str) or not isinstance(operands, (list, tuple)):
        return None
    given = [x for x in operands if is_tensor(x)]
    if len(given) < 2 or len(given) < len(operands) or "..." in equation:
        return None
    found = expand_equation(equation, tuple(len(shape(x)) for x in given))
    if found is None:
        return None
    (term, *others), out = found
    if len(others) == 1 and not (_scales(term, others[0], out) or _scales(others[0], term, out)):
        return None
    made = given[0]
    for i, (other, x) in enumerate(zip(others, given[1:], strict=True)):
        later = "".join(others[i + 1 :]) + out
        kept = out if i + 1 == len(others) else "".join(c for c in dict.fromkeys(term + other) if c in later)
        made, term = _product(emit, (term, made), (other, x), kept), kept
    return made


def _scales(whole: str, part: str, out: str) -> bool:
    """Nothing is summed, and one term has all letters."""
    return set(part) <= set(whole) == set(out)


def _product(emit: Emitter, left: tuple[str, fx.Node], right: tuple[str, fx.Node], out: str) -> fx.Node:
    (a, x), (b, y) = left, right
    if _scales(a, b, out):
        return emit.call(aten.mul.Tensor, _ordered(emit, x, a, out), _ordered(emit, y, b, out))
    if _scales(b, a, out):
        return _product(emit, right, left, out)
    return emit.call(aten.einsum.default, f"{a},{b}->{out}", [x, y])


def _ordered(emit: Emitter, x: fx.Node, term: str, out: str) -> fx.Node:
    """``x`` with the axes of ``out``, of length 1 where it has none."""
    order = sorted(range(len(term)), key=lambda i: out.index(term[i]))
    if order != sorted(order):
        x = emit.call(aten.permute.default, x, order)
    for place, letter in enumerate(out):
        if letter not in term:
            x = emit.call(aten.unsqueeze.default, x, place)
    return x
