"""Numbers computed for each pair of tokens, as sums of products of what either token has alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import fx
from torch.fx.node import Target

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import CASTS, arg, aten, dtype, is_call, is_tensor, operand, shape
from attnopt.graph.ops import ADD, COPIES, DIV, MUL, SUB, Kind, of, rules

_MOST = 8  # products in one sum


@dataclass(frozen=True)
class Part:
    """factor * left * right * both, which broadcast; None: 1.  ``left`` has no axis of the right tokens, ``right`` none of the
    left ones, and ``both`` neither."""

    factor: float = 1.0
    left: fx.Node | None = None
    right: fx.Node | None = None
    both: fx.Node | None = None

    def times(self, other: Part, emit: Emitter) -> Part:
        pairs = ((self.left, other.left), (self.right, other.right), (self.both, other.both))
        return Part(self.factor * other.factor, *(_product(emit, *pair) for pair in pairs))

    def map(self, change: Callable[[fx.Node], fx.Node]) -> Part:
        left, right, both = (None if x is None else change(x) for x in (self.left, self.right, self.both))
        return Part(self.factor, left, right, both)

    def of_sides(self, emit: Emitter) -> Part:
        """The same without ``both``, which goes to a side that has another factor."""
        if self.left is None and self.right is not None:
            return Part(self.factor, right=_product(emit, self.right, self.both))
        return Part(self.factor, _product(emit, self.left, self.both), self.right)


def _product(emit: Emitter, a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
    return a if b is None else b if a is None else emit.call(aten.mul.Tensor, a, b)


Separated = tuple[Part, ...]


def is_square(node: fx.Node) -> bool:
    return is_call(node, aten.square.default) or (is_call(node, aten.pow.Tensor_Scalar) and arg(node, 1) == 2)


@dataclass(frozen=True)
class Reader:
    """Reads tensors as sums over pairs: left tokens along one axis and right ones along another, counted from the end."""

    emit: Emitter

    def read(self, x: Any, i: int, j: int) -> Separated | None:
        """None if some number belongs to a pair and is no such sum."""
        if isinstance(x, (int, float)):
            return (Part(float(x)),)
        if not is_tensor(x):
            return None
        if not _has(x, j):
            return (Part(left=x) if _has(x, i) else Part(both=x),)
        if not _has(x, i):
            return (Part(right=x),)
        if (rule := _RULES.get(x.target)) is None or x.op != "call_function":
            return None
        found = rule(self, x, i, j)
        return found if found is not None and len(found) <= _MOST else None

    def sum(self, x: fx.Node, i: int, j: int, sign: float = 1.0) -> Separated | None:
        alpha = x.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            return None
        a = self.read(arg(x, 0), i, j)
        b = None if a is None else self.read(arg(x, 1), i, j)
        if a is None or b is None:
            return None
        return (*a, *(replace(part, factor=sign * alpha * part.factor) for part in b))

    def difference(self, x: fx.Node, i: int, j: int) -> Separated | None:
        return self.sum(x, i, j, -1.0)

    def product(self, x: fx.Node, i: int, j: int) -> Separated | None:
        a = self.read(arg(x, 0), i, j)
        return None if a is None else self._times(a, self.read(arg(x, 1), i, j))

    def _times(self, a: Separated | None, b: Separated | None) -> Separated | None:
        if a is None or b is None or len(a) * len(b) > _MOST:
            return None
        return tuple(first.times(second, self.emit) for first in a for second in b)

    def quotient(self, x: fx.Node, i: int, j: int) -> Separated | None:
        """Divided by what is a single product."""
        a = self.read(arg(x, 0), i, j)
        b = None if a is None else self.read(arg(x, 1), i, j)
        if b is None or len(b) != 1 or b[0].factor == 0:
            return None
        inverse = b[0].map(lambda n: self.emit.call(aten.reciprocal.default, n))
        return self._times(a, (replace(inverse, factor=1 / b[0].factor),))

    def negative(self, x: fx.Node, i: int, j: int) -> Separated | None:
        return self._times((Part(-1.0),), self.read(arg(x, 0), i, j))

    def square(self, x: fx.Node, i: int, j: int) -> Separated | None:
        found = self.read(arg(x, 0), i, j) if is_square(x) else None
        return self._times(found, found)

    def cosine(self, x: fx.Node, i: int, j: int) -> Separated | None:
        """cos(a + b) = cos a cos b - sin a sin b"""
        return self._of_angle(x, i, j, ((1.0, aten.cos, aten.cos), (-1.0, aten.sin, aten.sin)))

    def sine(self, x: fx.Node, i: int, j: int) -> Separated | None:
        """sin(a + b) = sin a cos b + cos a sin b"""
        return self._of_angle(x, i, j, ((1.0, aten.sin, aten.cos), (1.0, aten.cos, aten.sin)))

    def _of_angle(self, x: fx.Node, i: int, j: int, made: Iterable[tuple[float, Any, Any]]) -> Separated | None:
        read = self.read(arg(x, 0), i, j)
        found = None if read is None else [part.of_sides(self.emit) for part in read]
        if found is None or any(part.left is not None and part.right is not None for part in found):
            return None
        of_right = [self._scaled(part.factor, part.right) for part in found if part.right is not None]
        of_left = [self._scaled(part.factor, part.left) for part in found if part.right is None]
        if not of_right or not any(isinstance(a, fx.Node) for a in of_left):
            return None
        left, right = self._added(of_left), self._added(of_right)
        return tuple(
            Part(factor, self.emit.call(f.default, left), self.emit.call(g.default, right)) for factor, f, g in made
        )

    def _scaled(self, factor: float, x: fx.Node | None) -> fx.Node | float:
        if x is None:
            return factor
        return x if factor == 1 else self.emit.call(aten.mul.Tensor, x, factor)

    def _added(self, summands: list[fx.Node | float]) -> fx.Node:
        nodes = [x for x in summands if isinstance(x, fx.Node)]
        constant = sum(x for x in summands if not isinstance(x, fx.Node))
        total = reduce(lambda a, b: self.emit.call(aten.add.Tensor, a, b), nodes)
        return total if constant == 0 else self.emit.call(aten.add.Tensor, total, constant)

    def copy(self, x: fx.Node, i: int, j: int) -> Separated | None:
        return self.read(arg(x, 0), i, j)

    def cast(self, x: fx.Node, i: int, j: int) -> Separated | None:
        """Differences of whole numbers become floating-point numbers one by one."""
        kind, found = dtype(x), self.read(arg(x, 0), i, j)
        if found is None or not kind.is_floating_point:
            return None
        return tuple(part.map(lambda n: self.emit.call(aten._to_copy.default, n, dtype=kind)) for part in found)

    def with_ones(self, x: fx.Node, i: int, j: int) -> Separated | None:
        """``x`` has the axes of its operand and others of length 1."""
        inner = operand(x)
        places = _places(shape(inner), shape(x))
        if places is None:
            return None
        i, j = (next(at for at, to in places.items() if to == axis) for axis in (i, j))
        found = self.read(inner, i, j)
        return None if found is None else tuple(part.map(lambda n: self._spread(n, places, x)) for part in found)

    def _spread(self, n: fx.Node, places: dict[int, int], x: fx.Node) -> fx.Node:
        """``n``, which broadcasts to the operand of ``x``, with its axes where ``x`` has them."""
        sizes: list[Any] = [1] * len(shape(x))
        for at, to in places.items():
            if _has(n, at):
                sizes[to] = self.emit.size(n, at)
        return self.emit.call(aten.reshape.default, n, sizes)


def _has(x: fx.Node, axis: int) -> bool:
    sizes = shape(x)
    return -axis <= len(sizes) and sizes[axis] != 1


def _places(before: tuple[int, ...], after: tuple[int, ...]) -> dict[int, int] | None:
    """Where each axis that is longer than 1 goes, both counted from the end, if their order is the same."""
    own, new = ([a - len(sizes) for a, size in enumerate(sizes) if size != 1] for sizes in (before, after))
    if [before[a] for a in own] != [after[a] for a in new]:
        return None
    return dict(zip(own, new, strict=True))


_RULES: dict[Target, Callable[[Reader, fx.Node, int, int], Separated | None]] = rules(
    {
        ADD: Reader.sum,
        SUB: Reader.difference,
        MUL: Reader.product,
        DIV: Reader.quotient,
        "neg": Reader.negative,
        "square pow.Tensor_Scalar": Reader.square,
        "cos": Reader.cosine,
        "sin": Reader.sine,
        COPIES | of(Kind.EXPAND): Reader.copy,
        CASTS: Reader.cast,
        of(Kind.RESHAPE, Kind.ONES): Reader.with_ones,
    }
)
