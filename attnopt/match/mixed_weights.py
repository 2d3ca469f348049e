"""Softmax weights mixed with a map that no input changes: ``keep * weights + added``, in any spelling.

ConViT (arXiv:2103.10697) does so with a gate for each head.  What is mixed in stays part of the graph: its parameters can be
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.node import Target

from attnopt.graph.axes import FOLLOWED, Atom, Axes, broadcast, follow, length, resolve_all
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import ancestors, arg, aten, calls, is_call, is_number, is_tensor, operand, shape
from attnopt.graph.ops import ADD, DIV, MUL, SUB, is_random, rules
from attnopt.match.mixture import Computed, Mixture, Value, operands_of
from attnopt.match.overwrites import number
from attnopt.match.read_scores import Operand
from attnopt.match.region import atoms_of
from attnopt.match.row_sums import row_sums


def is_mixing(node: fx.Node) -> bool:
    return node.target in _RULES


def mixes(node: fx.Node, weights: fx.Node) -> bool:
    """``node`` may be a mixture of ``weights``: between the two, nothing else depends on an input, and there are only sums,
    products, divisions, choices and layouts."""
    inside = _between(weights, node) - {weights}
    known = (is_mixing(n) or n.target in FOLLOWED or is_call(n, aten.sum.dim_IntList) for n in inside)
    others = (i for n in inside for i in n.all_input_nodes if i not in inside and i is not weights)
    return any(map(is_mixing, inside)) and all(known) and all(map(_is_fixed, others))


def read_mixture(node: fx.Node, weights: fx.Node, axes: Axes, axis: int, sums_to_one: bool) -> Mixture | None:
    """``node`` in terms of ``weights``, a softmax over ``axis`` of ``axes``; ``sums_to_one``: each of its rows does."""
    axes = resolve_all(axes)
    own = Mixture(1.0, 0.0, axes)
    reader = _Reader(_between(weights, node), {weights: own}, frozenset(axes[axis]), sums_to_one)
    found = reader.read(node)
    if found is None or found.keep == 0.0 or not _has_keys(found.added, reader.keys):
        return None
    return None if any(atoms_of(o.axes) & reader.keys for o in _beside_sums(found.keep)) else found


@dataclass(frozen=True)
class _Reader:
    """``known``: what nodes turned out to be."""

    inside: set[fx.Node]
    known: dict[fx.Node, Mixture]
    keys: frozenset[Atom]
    sums_to_one: bool

    def read(self, node: fx.Node) -> Mixture | None:
        if node not in self.known:
            found = self._read(node)
            if found is None or shape(node) != tuple(length(axis) for axis in resolve_all(found.axes)):
                return None
            self.known[node] = found
        return self.known[node]

    def _read(self, node: fx.Node) -> Mixture | None:
        if node.target in FOLLOWED:
            inner = self.read(operand(node))
            axes = None if inner is None else follow(node, inner.axes)
            return None if inner is None or axes is None else replace(inner, axes=axes)
        if calls(node, DIV) and arg(node, 1) in self.inside:
            return self._normalised(node)
        count, rule = _RULES.get(node.target, (0, None))
        if rule is None or len(node.args) != count:
            return None
        mixtures = [self.read(x) for x in node.args if isinstance(x, fx.Node) and x in self.inside]
        if not mixtures or None in mixtures:
            return None
        frames = {resolve_all(m.axes) for m in mixtures if m is not None}
        if len(frames) > 1:  # a sum with another layout of itself is a map of other pairs
            return None
        frame = frames.pop()
        given = [self._operand(x, frame) for x in node.args]
        return None if None in given else rule(node, *given)

    def _operand(self, x: Any, frame: Axes) -> Mixture | None:
        if isinstance(x, fx.Node) and x in self.inside:
            return self.read(x)
        if (constant := number(x)) is not None:
            return Mixture(0.0, constant, frame)
        axes = broadcast(x, frame) if is_tensor(x) and _is_fixed(x) else None
        return None if axes is None else Mixture(0.0, Operand(x, axes), frame)

    def _normalised(self, node: fx.Node) -> Mixture | None:
        """Divided by the sums of its rows, which are known where those of the weights are."""
        whole = self.read(operand(node))
        if whole is None or not self.sums_to_one or node.kwargs or not _has_keys(whole.added, self.keys):
            return None
        axis = next((i for i, a in enumerate(resolve_all(whole.axes)) if self.keys <= set(a)), None)
        if not any(s.axis == axis and s.divides(node) for s in row_sums(operand(node))):
            return None
        total = _plus(whole.keep, Computed(aten.sum.dim_IntList, (whole.added, [-1], True)))
        return replace(whole, keep=_over(whole.keep, total), added=_over(whole.added, total))


def _sum(node: fx.Node, a: Mixture, b: Mixture, sign: float = 1.0) -> Mixture | None:
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or set(node.kwargs) - {"alpha"}:
        return None
    b = _scaled(b, sign * float(alpha))
    return Mixture(_plus(a.keep, b.keep), _plus(a.added, b.added), a.axes)


def _product(node: fx.Node, a: Mixture, b: Mixture) -> Mixture | None:
    if b.keep != 0.0:
        a, b = b, a
    return None if b.keep != 0.0 or node.kwargs else _scaled(a, b.added)


def _quotient(node: fx.Node, a: Mixture, b: Mixture) -> Mixture | None:
    if b.keep != 0.0 or node.kwargs:
        return None
    return replace(a, keep=_over(a.keep, b.added), added=_over(a.added, b.added))


def _interpolated(node: fx.Node, a: Mixture, b: Mixture, by: Mixture) -> Mixture | None:
    """a + by (b - a)"""
    if by.keep != 0.0 or node.kwargs:
        return None
    left, right = _scaled(a, _plus(_times(-1.0, by.added), 1.0)), _scaled(b, by.added)
    return Mixture(_plus(left.keep, right.keep), _plus(left.added, right.added), a.axes)


def _chosen(condition: Mixture, a: Mixture, b: Mixture) -> Mixture | None:
    """What ``where`` gives, as an exported ``torch.lerp`` has it."""
    if condition.keep != 0.0:
        return None
    if isinstance(condition.added, float):
        return a if condition.added else b
    return Mixture(_where(condition.added, a.keep, b.keep), _where(condition.added, a.added, b.added), a.axes)


# For each operator the number of its arguments, and what it makes of mixtures.  What does not hold the weights is one of which
# nothing is kept.
_RULES: Mapping[Target, tuple[int, Callable[..., Mixture | None]]] = rules(
    {
        ADD: (2, _sum),
        SUB: (2, lambda node, a, b: _sum(node, a, b, -1.0)),
        "rsub": (2, lambda node, a, b: _sum(node, b, a, -1.0)),
        MUL: (2, _product),
        DIV: (2, _quotient),
        "lerp": (3, _interpolated),
        "neg": (1, lambda node, a: _scaled(a, -1.0)),
        "where.self": (3, lambda node, condition, a, b: _chosen(condition, a, b)),
    }
)


def _scaled(m: Mixture, by: Value) -> Mixture:
    return replace(m, keep=_times(by, m.keep), added=_times(by, m.added))


def _plus(a: Value, b: Value) -> Value:
    if isinstance(a, float) and isinstance(b, float):
        return a + b
    if isinstance(a, float):
        a, b = b, a
    return a if b == 0.0 else Computed(aten.add.Tensor, (a, b))


def _times(a: Value, b: Value) -> Value:
    if isinstance(a, float) and isinstance(b, float):
        return a * b
    if isinstance(a, float):
        a, b = b, a
    return b if b == 0.0 else a if b == 1.0 else Computed(aten.mul.Tensor, (a, b))


def _over(a: Value, b: Value) -> Value:
    if isinstance(b, float):
        return _times(a, 1.0 / b) if b else Computed(aten.div.Tensor, (a, b))
    return (
        _times(a, Computed(aten.reciprocal.default, (b,)))
        if isinstance(a, float)
        else Computed(aten.div.Tensor, (a, b))
    )


def _where(condition: Value, a: Value, b: Value) -> Value:
    if a == b:
        return a
    scalars = {
        (False, False): aten.where.self, (True, False): aten.where.ScalarSelf, (False, True): aten.where.ScalarOther,
        (True, True): aten.where.Scalar,
    }  # fmt: skip
    return Computed(scalars[isinstance(a, float), isinstance(b, float)], (condition, a, b))


def _has_keys(value: object, keys: frozenset[Atom]) -> bool:
    """It has a number for each key."""
    if isinstance(value, Operand):
        return keys <= atoms_of(value.axes)
    if not isinstance(value, Computed) or value.target is aten.sum.dim_IntList:
        return False
    return any(_has_keys(x, keys) for x in value.args)


def _beside_sums(value: Value) -> list[Operand]:
    """The tensors whose axes it has."""
    if not isinstance(value, Computed):
        return list(operands_of(value))
    return [] if value.target is aten.sum.dim_IntList else [o for x in value.args for o in _beside_sums(x)]


def _is_fixed(node: fx.Node) -> bool:
    """The same at every call, but for the training of parameters."""
    return not inputs_behind(node) and not any(is_random(n.target) for n in ancestors(node, stop=is_number))


def _between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """``start`` and what depends on it, up to ``end``."""
    order = {n: i for i, n in enumerate(start.graph.nodes)}
    found = {start}
    for node in sorted(ancestors(end), key=order.__getitem__):
        if order[node] > order[start] and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
