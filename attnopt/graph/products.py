"""Every product of two tensors in one normal form, for any operator: matmul, bmm, linear, einsum, tensordot, mul + sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import Target

from attnopt.graph.axes import Atom, Axes, Axis, fresh
from attnopt.graph.nodes import arg, aten, is_call, is_tensor, shape, wrap
from attnopt.graph.ops import rules


@dataclass(frozen=True)
class Product:
    """``node`` = alpha * sum over the contracted axes of left * right (+ beta * addend).

    The axes of the three tensors share atoms: one in both operands and in the result is a batch axis, one
    in both operands only is contracted.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: Axes
    right_axes: Axes
    axes: Axes
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0

    def swapped(self) -> Product:
        return Product(
            self.node,
            self.right,
            self.left,
            self.right_axes,
            self.left_axes,
            self.axes,
            self.alpha,
            self.addend,
            self.beta,
        )


def product_of(node: fx.Node) -> Product | None:
    """The product that ``node`` computes, or None."""
    rule = PRODUCTS.get(node.target)
    return None if rule is None else rule(node)


def _of_two(node: fx.Node) -> Product | None:
    return _matmul(node, arg(node, 0), arg(node, 1))


def _matmul(node: fx.Node, a: object, b: object, **extra: Any) -> Product | None:
    if not (is_tensor(a) and is_tensor(b)):
        return None
    sa, sb, out = shape(a), shape(b), shape(node)
    if len(sa) < 2 or len(sb) < 2:
        return None
    axes = fresh(out)
    (inner,) = fresh((sa[-1],))
    batch = axes[:-2]

    def of(sizes: tuple[int, ...]) -> list[Axis]:
        aligned = batch[len(batch) - (len(sizes) - 2) :]
        return [ax if s != 1 else () for s, ax in zip(sizes[:-2], aligned, strict=True)]

    return Product(node, a, b, (*of(sa), axes[-2], inner), (*of(sb), inner, axes[-1]), axes, **extra)


def _with_addend(node: fx.Node) -> Product | None:
    addend, a, b = arg(node, 0), arg(node, 1), arg(node, 2)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if not is_tensor(addend) or not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None
    return _matmul(node, a, b, alpha=float(alpha), addend=addend if beta != 0 else None, beta=float(beta))


def _linear(node: fx.Node) -> Product | None:
    a, b = arg(node, 0), arg(node, 1)
    if not (is_tensor(a) and is_tensor(b)) or len(node.args) != 2:  # a bias
        return None
    if len(shape(b)) != 2:
        return None
    axes = fresh(shape(node))
    (inner,) = fresh((shape(a)[-1],))
    return Product(node, a, b, (*axes[:-1], inner), (axes[-1], inner), axes)


def _tensordot(node: fx.Node) -> Product | None:
    a, b = arg(node, 0), arg(node, 1)
    if not (is_tensor(a) and is_tensor(b)) or 0 in (len(shape(a)), len(shape(b))):
        return None
    dims = (arg(node, 2), arg(node, 3)) if is_call(node, aten.tensordot.default) else ([-1], [-1])
    summed = [[wrap(int(d), len(shape(x))) for d in own] for x, own in zip((a, b), dims, strict=True)]
    inner = dict(zip(summed[0], fresh(tuple(shape(a)[d] for d in summed[0])), strict=True))
    left = tuple(inner.get(i, ax) for i, ax in enumerate(fresh(shape(a))))
    across = {theirs: inner[own] for own, theirs in zip(*summed, strict=True)}
    right = tuple(across.get(i, ax) for i, ax in enumerate(fresh(shape(b))))
    axes = [ax for i, ax in enumerate(left) if i not in inner] + [ax for i, ax in enumerate(right) if i not in across]
    return Product(node, a, b, left, right, tuple(axes))


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = arg(node, 0), arg(node, 1)
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    a, b = operands
    if not (is_tensor(a) and is_tensor(b)):
        return None
    terms = expand_equation(equation, (len(shape(a)), len(shape(b))))
    if terms is None:
        return None
    (ta, tb), out = terms
    sizes: dict[str, int] = {}
    for term, found in ((ta, shape(a)), (tb, shape(b))):
        for letter, size in zip(term, found, strict=True):
            if sizes.get(letter, 1) not in (1, size) and size != 1:
                return None
            sizes[letter] = max(size, sizes.get(letter, 1))
    atoms: dict[str, Axis] = {c: (Atom(s, c),) if s != 1 else () for c, s in sizes.items()}

    def axes(term: str, found: tuple[int, ...]) -> Axes:
        return tuple(atoms[c] if s != 1 else () for c, s in zip(term, found, strict=True))

    return Product(node, a, b, axes(ta, shape(a)), axes(tb, shape(b)), tuple(atoms[c] for c in out))


def expand_equation(equation: str, ndims: tuple[int, ...]) -> tuple[tuple[str, ...], str] | None:
    """An einsum equation with explicit output and upper-case letters for the ellipsis; None if a letter repeats in a term."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ndims):
        return None
    dots = [n - len(t.replace("...", "")) if "..." in t else 0 for t, n in zip(terms, ndims, strict=True)]
    widest = "ΑΒΓΔΕΖΗΘ"[: max(dots)]  # Greek capitals, which no equation uses
    terms = [t.replace("...", widest[len(widest) - d :]) for t, d in zip(terms, dots, strict=True)]
    if not arrow:
        joined = "".join(terms)
        out = widest + "".join(sorted(c for c in set(joined) - set(widest) if joined.count(c) == 1))
    out = out.replace("...", widest)
    if any(len(set(t)) != len(t) for t in (*terms, out)):
        return None
    return tuple(terms), out


def _mul_sum(node: fx.Node) -> Product | None:
    mul, dims = arg(node, 0), arg(node, 1)
    keepdim = bool(arg(node, 2)) if len(node.args) > 2 else False
    if not is_call(mul, aten.mul.Tensor) or not isinstance(dims, (list, tuple)) or not dims:
        return None
    a, b = arg(mul, 0), arg(mul, 1)
    if not (is_tensor(a) and is_tensor(b)):
        return None
    frame = fresh(shape(mul))
    summed = {wrap(int(d), len(frame)) for d in dims}

    def of(x: fx.Node) -> Axes:
        sizes = shape(x)
        aligned = frame[len(frame) - len(sizes) :]
        return tuple(ax if s != 1 else () for s, ax in zip(sizes, aligned, strict=True))

    out = [() if i in summed else ax for i, ax in enumerate(frame) if keepdim or i not in summed]
    shared = {c for i in summed for c in frame[i]}
    both = {c for ax in of(a) for c in ax} & {c for ax in of(b) for c in ax}
    return Product(node, a, b, of(a), of(b), tuple(out)) if shared <= both else None


def pair_product(whole: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``whole``, which sums over pairs of tokens, and beside it vectors [.., i, 1, C] and [.., 1, j, C] whose products it is.
    ``attnopt.match.pair_sums`` writes it: as an operator of a graph it never leaves the matcher."""
    return whole


def _of_pairs(node: fx.Node) -> Product | None:
    whole, left, right = node.args
    assert is_tensor(whole)
    assert is_tensor(left)
    assert is_tensor(right)
    frame, (inner,) = fresh(shape(whole)), fresh((shape(left)[-1],))

    def of(x: fx.Node) -> Axes:
        return (*(ax if s != 1 else () for s, ax in zip(shape(x)[:-1], frame, strict=False)), inner)

    return Product(node, left, right, of(left), of(right), frame)


PRODUCTS: dict[Target, Callable[[fx.Node], Product | None]] = rules(
    {
        "matmul bmm mm": _of_two,
        "baddbmm addmm": _with_addend,
        "linear": _linear,
        "einsum": _einsum,
        "tensordot inner": _tensordot,
        "sum.dim_IntList": _mul_sum,
        frozenset((pair_product,)): _of_pairs,
    }
)
