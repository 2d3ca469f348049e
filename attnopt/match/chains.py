"""The anchors of attentions without a softmax: two products of activations, one of the result of the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attnopt.graph.axes import FOLLOWED, broadcast, fresh
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import arg, aten, calls, is_call, is_tensor, operand, shape
from attnopt.graph.ops import FACTORS, MUL, Kind, named, of
from attnopt.graph.products import Product, product_of
from attnopt.match.overwrites import MASKED_FILL, WHERE
from attnopt.match.read_scores import MAX_DEPTH

TRIANGLES = of(Kind.TRIANGLE)
RUNNING = named("cumsum")
_OF_FIRST = frozenset(FOLLOWED) | FACTORS | MASKED_FILL | TRIANGLES | RUNNING | named("neg")


@dataclass(frozen=True)
class Chain:
    """``second`` multiplies the last node of ``path``, its left operand, by another tensor.  ``path`` begins with the result of
    ``first``, whose numbers it rearranges, multiplies one by one, and may sum up to each place of an axis."""

    first: Product
    path: tuple[fx.Node, ...]
    second: Product


def chains(graph: fx.Graph) -> Iterator[Chain]:
    """In the order in which they end.  Neither product is one with weights."""
    for node in graph.nodes:
        for is_swapped in (False, True):
            second = _of_activations(node)  # anew: whoever reads a chain joins its axes
            if second is None:
                break
            second = second.swapped() if is_swapped else second
            path = _from_product(second.left)
            if path and (first := _first(path)) is not None:
                yield Chain(first, path, second)


def _first(path: tuple[fx.Node, ...]) -> Product | None:
    """The product that ``path`` begins with; one without a sum only if sums of it follow."""
    found = _of_activations(path[0])
    return _outer(path[0]) if found is None and any(calls(n, RUNNING) for n in path) else found


def _outer(node: fx.Node) -> Product | None:
    """Products of all elements of one tensor with all of another, along axes that either has alone."""
    if not is_call(node, aten.mul.Tensor) or not all(map(is_tensor, (arg(node, 0), arg(node, 1)))):
        return None
    left, right, axes = operand(node), operand(node, 1), fresh(shape(node))
    if left is right or not all(map(inputs_behind, (left, right))):
        return None
    of_left, of_right = broadcast(left, axes), broadcast(right, axes)
    return None if of_left is None or of_right is None else Product(node, left, right, of_left, of_right, axes)


def _of_activations(node: fx.Node) -> Product | None:
    found = product_of(node)
    if found is None or found.addend is not None or found.left is found.right:
        return None
    return found if all(map(inputs_behind, (found.left, found.right))) else None


def _from_product(node: fx.Node) -> tuple[fx.Node, ...]:
    """The way to ``node`` from the nearest product above it; empty if there is none."""
    stack: list[tuple[fx.Node, ...]] = [(node,)]
    seen = {node}
    while stack:
        path = stack.pop()
        if _first(path) is not None:
            return path
        if len(path) > MAX_DEPTH:
            continue
        above = [n for n in _sources(path[0]) if n not in seen]
        seen.update(above)
        stack.extend((n, *path) for n in reversed(above))
    return ()


def _sources(node: fx.Node) -> list[fx.Node]:
    """The operands whose numbers ``node`` may have, each multiplied by something."""
    if calls(node, WHERE):
        found = [arg(node, 1), arg(node, 2)]
    elif calls(node, MUL):
        found = [arg(node, 0), arg(node, 1)]
    else:
        found = [operand(node)] if calls(node, _OF_FIRST) and node.args else []
    return [n for n in found if is_tensor(n) and math.prod(shape(n)) == math.prod(shape(node)) and inputs_behind(n)]
