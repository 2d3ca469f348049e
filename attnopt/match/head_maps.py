"""Linear maps across heads, of scores or of weights (talking heads, arXiv:2003.02436): a product with a matrix in any spelling,
or a convolution with kernels of one element.

What is mapped has the axes that it had: along that of the heads each element is a sum over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.graph.axes import Axes, Axis, resolve_all
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import arg, aten, calls, is_call, is_tensor, shape
from attnopt.graph.ops import Kind, of
from attnopt.graph.products import product_of

_CONVOLUTIONS = of(Kind.CONVOLUTION)


@dataclass(frozen=True)
class HeadMap:
    """``weight`` [to, from], the other way round if ``transposed``, along ``axis``, and what is ``added`` to each head [to]."""

    weight: fx.Node
    transposed: bool
    axis: Axis
    added: fx.Node | None = None


def maps_heads(node: fx.Node, source: fx.Node) -> bool:
    """``node`` may map the heads of ``source``."""
    return _parts(node, source) is not None


def head_map(node: fx.Node, source: fx.Node, axes: Axes) -> tuple[HeadMap, Axes] | None:
    """The map that ``node`` applies to ``source``, which has ``axes``, and the axes of the result."""
    found = _parts(node, source)
    if found is None:
        return None
    axes = resolve_all(axes)
    mapped = axes[found.at]
    if not mapped or shape(node)[found.to] != shape(source)[found.at]:
        return None
    made = tuple(mapped if i == found.to else axes[found.place[i]] for i in range(len(shape(node))))
    return HeadMap(found.weight, found.transposed, mapped, found.added), made


@dataclass(frozen=True)
class _Parts:
    """``at``: the mapped axis of the source; ``to``: its place in the result; ``place``: of the other axes of the result, in the
    source."""

    weight: fx.Node
    transposed: bool
    at: int
    to: int
    place: dict[int, int]
    added: fx.Node | None = None


def _parts(node: fx.Node, source: fx.Node) -> _Parts | None:
    if is_call(node, aten.linear.default) and arg(node, 0) is source:
        return _of_last(node, source)
    if calls(node, _CONVOLUTIONS) and arg(node, 0) is source:
        return _of_channels(node, source)
    product = product_of(node)
    if (
        product is None
        or product.addend is not None
        or product.alpha != 1.0
        or source not in (product.left, product.right)
    ):
        return None
    product = product if product.left is source else product.swapped()
    if product.right is source or not _is_matrix(product.right):
        return None
    left, right, result = (resolve_all(x) for x in (product.left_axes, product.right_axes, product.axes))
    contracted = [i for i, axis in enumerate(left) if axis and axis not in result]
    new = [i for i, axis in enumerate(result) if axis and axis not in left]
    if len(contracted) != 1 or len(new) != 1:
        return None
    pair = left[contracted[0]], result[new[0]]
    if right not in (pair, pair[::-1]):
        return None
    place = {i: left.index(axis) for i, axis in enumerate(result) if i != new[0] and axis in left}
    if len(place) < len(result) - 1 or len(set(place.values())) < len(place):
        return None
    return _Parts(product.right, right == pair, contracted[0], new[0], place)


def _of_last(node: fx.Node, source: fx.Node) -> _Parts | None:
    weight, bias, last = arg(node, 1), arg(node, 2), len(shape(source)) - 1
    if last < 3 or not is_tensor(weight) or not _is_matrix(weight) or (bias is not None and inputs_behind(bias)):
        return None
    return _Parts(weight, False, last, last, {i: i for i in range(last)}, bias)


def _of_channels(node: fx.Node, source: fx.Node) -> _Parts | None:
    weight, bias, ndim = arg(node, 1), arg(node, 2), len(shape(source))
    if inputs_behind(weight) or any(size != 1 for size in shape(weight)[2:]) or len(shape(weight)) != ndim:
        return None
    if (
        shape(weight)[0] != shape(weight)[1]
        or shape(weight)[1] != shape(source)[1]
        or shape(node)[2:] != shape(source)[2:]
    ):
        return None
    if bias is not None and inputs_behind(bias):
        return None
    return _Parts(weight, False, 1, 1, {i: i for i in range(ndim) if i != 1}, bias)


def _is_matrix(node: fx.Node) -> bool:
    """As many heads come out as go in."""
    return len(shape(node)) == 2 and shape(node)[0] == shape(node)[1] and not inputs_behind(node)
