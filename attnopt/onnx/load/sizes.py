"""Sizes of values that only ONNX Runtime computes: arithmetic of known sizes, as text.

``x0_1`` is axis 1 of the first input, ``d2`` the third free axis of the file, ``?`` a size that depends on values.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

UNKNOWN = "?"
Size = int | torch.SymInt


@dataclass(frozen=True)
class Sized:
    """The dtype of a value and each of its sizes as an expression."""

    dtype: torch.dtype
    sizes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}: {'; '.join(self.sizes)}"

    @property
    def is_known(self) -> bool:
        return UNKNOWN not in self.sizes

    def at(self, shapes: Sequence[Sequence[Size]], free: Sequence[Size]) -> list[Size | None]:
        """The sizes for inputs of these shapes, None if unknown.  Symbolic sizes give symbolic ones."""
        known = {f"x{i}_{a}": n for i, shape in enumerate(shapes) for a, n in enumerate(shape)}
        known |= {f"d{i}": n for i, n in enumerate(free)}
        return [None if text == UNKNOWN else number(text, known) for text in self.sizes]


@lru_cache(maxsize=4096)
def parse(text: str) -> Sized:
    """What ``Sized`` prints."""
    dtype, _, sizes = text.partition(": ")
    found: torch.dtype = getattr(torch, dtype)
    return Sized(found, tuple(sizes.split("; ")) if sizes else ())


def names(text: str) -> set[str]:
    """The sizes in an expression; {"?"} if it is not an expression."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return {UNKNOWN}
    functions = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - functions


def number(text: str, known: Mapping[str, Size]) -> Size:
    """The value of an expression.  ValueError, KeyError or SyntaxError if it is not an integer expression."""
    above, below = _fraction(ast.parse(text, mode="eval").body, known)
    if below != 1:
        raise ValueError(f"{text} is not an integer")
    return above


def _fraction(node: ast.expr, known: Mapping[str, Size]) -> tuple[Size, int]:
    """Numerator, which may be symbolic, and denominator."""
    match node:
        case ast.Constant(int(value)):
            return value, 1
        case ast.Name(name):
            return known[name], 1
        case ast.UnaryOp(ast.USub(), operand):
            above, below = _fraction(operand, known)
            return -above, below
        case ast.BinOp(left, (ast.Add() | ast.Sub()) as how, right):
            (a, b), (c, d) = _fraction(left, known), _fraction(right, known)
            c = c if isinstance(how, ast.Add) else -c
            return (a + c, b) if b == d else (a * d + c * b, b * d)
        case ast.BinOp(left, ast.Mult(), right):
            (a, b), (c, d) = _fraction(left, known), _fraction(right, known)
            return a * c, b * d
        case ast.BinOp(left, (ast.Div() | ast.FloorDiv()) as how, right):
            (a, b), (c, d) = _fraction(left, known), _fraction(right, known)
            if not isinstance(c, int) or c <= 0:
                raise ValueError("a divisor that is not a known number")
            return (a * d, b * c) if isinstance(how, ast.Div) else ((a * d) // (b * c), 1)
        case ast.Call(ast.Name("floor"), [inner], []):
            above, below = _fraction(inner, known)
            return (above if below == 1 else above // below), 1
        case ast.Call(ast.Name("ceiling"), [inner], []):
            above, below = _fraction(inner, known)
            return (above if below == 1 else -(-above // below)), 1
    raise ValueError(f"{ast.dump(node)[:60]} is not a size")
