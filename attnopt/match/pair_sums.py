"""Scores that sum over features what is computed for each pair of tokens, as products of two vectors.

    sum_c |q_c| |k_c| cos(a_c - b_c)  =  [|q| cos a, |q| sin a] . [|k| cos b, |k| sin b]
    sum_c (q_c - k_c)^2               =  [-2 q, sum_c q_c^2, 1] . [k, 1, sum_c k_c^2]

Each number of a pair must be a sum of products of what either token has alone.  The model's own sum stays in the graph beside the
product, and takes its place again where no attention is raised.
"""

from __future__ import annotations

from itertools import combinations

from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.evaluate import is_heavy
from attnopt.graph.nodes import ancestors, arg, aten, calls, is_call, operand, shape, value, wrap
from attnopt.graph.ops import named
from attnopt.graph.products import Product, pair_product, product_of
from attnopt.match.anchors import Softmax, normalisers
from attnopt.match.region import atoms_of
from attnopt.match.separated import Part, Reader, Separated, is_square

_DISTANCES = named("cdist _cdist_forward")


def write_products(gm: fx.GraphModule) -> None:
    """Write, in place, the product beside each sum over pairs that a softmax may normalise."""
    for anchor in list(normalisers(gm.graph)):
        if not isinstance(anchor, Softmax):
            continue
        for node in list(ancestors(anchor.scores, stop=_is_end)):
            if node.op == "call_function" and all(user.target is not pair_product for user in node.users):
                _write_product(gm, node)


def remove_products(gm: fx.GraphModule) -> None:
    """Give each sum back to what reads its product."""
    for node in [n for n in gm.graph.nodes if n.target is pair_product]:
        node.replace_all_uses_with(operand(node))
        gm.graph.erase_node(node)


def _is_end(node: fx.Node) -> bool:
    return is_heavy(node) or calls(node, _DISTANCES) or node.target is pair_product


def _write_product(gm: fx.GraphModule, node: fx.Node) -> None:
    after = node.next
    emit = Emitter(gm.graph, after)
    made = _of_distance(emit, node) or _of_cosines(emit, node) or _of_sum(emit, node)
    if made is None:
        while after.prev is not node:  # what was written before the reader failed
            gm.graph.erase_node(after.prev)
        return
    product = emit.run(pair_product, node, *made, like=value(node))
    node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)


def _of_sum(emit: Emitter, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    dims = arg(node, 1) if is_call(node, aten.sum.dim_IntList) and not node.kwargs else None
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or _is_read_as_it_stands(product_of(node)):
        return None
    x = operand(node)
    ndim = len(shape(x))
    if wrap(dims[0], ndim) != ndim - 1 or not _is_precise(x):
        return None
    axes = [axis - ndim for axis, size in enumerate(shape(x)[:-1]) if size != 1]
    for pair in combinations(axes, 2):
        found = Reader(emit).read(x, *pair)
        if found is not None and any(part.left is not None and part.right is not None for part in found):
            return _vectors(emit, found, x)
    return None


def _is_precise(x: fx.Node) -> bool:
    """Small differences of large numbers keep enough digits: in half precision they do not."""
    kind = value(x).dtype
    return bool(kind.is_floating_point) and kind.itemsize >= 4


def _is_read_as_it_stands(product: Product | None) -> bool:
    """Either factor has an axis of its own."""
    if product is None:
        return False
    left, right = atoms_of(product.left_axes), atoms_of(product.right_axes)
    return bool(left - right) and bool(right - left)


def _of_distance(emit: Emitter, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The square of a Euclidean distance."""
    distance = arg(node, 0) if is_square(node) else None
    if not calls(distance, _DISTANCES) or arg(distance, 2, 2.0) != 2 or not _is_precise(distance):
        return None
    q = emit.call(aten.unsqueeze.default, operand(distance, 0), -2)
    k = emit.call(aten.unsqueeze.default, operand(distance, 1), -3)
    left, right = (emit.call(aten.mul.Tensor, x, x) for x in (q, k))
    return _vectors(emit, (Part(-2.0, q, k), Part(1.0, left=left), Part(1.0, right=right)), q)


def _of_cosines(emit: Emitter, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The cosines of all pairs, of vectors that are laid out against each other."""
    if not is_call(node, aten.cosine_similarity.default) or len(shape(operand(node))) != len(shape(operand(node, 1))):
        return None
    q, k, ndim = operand(node), operand(node, 1), len(shape(operand(node)))
    if wrap(arg(node, 2, 1), ndim) != ndim - 1 or shape(q) == shape(k):
        return None

    def unit(x: fx.Node) -> fx.Node:
        norm = emit.call(aten.linalg_vector_norm.default, x, 2, [-1], True)
        return emit.call(aten.div.Tensor, x, emit.call(aten.clamp_min.default, norm, arg(node, 3, 1e-8)))

    return unit(q), unit(k)


def _vectors(emit: Emitter, found: Separated, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """[.., i, 1, C] and [.., 1, j, C] whose products over C are the sums over the last axis of ``like``."""
    ndim = len(shape(like))
    one = emit.call(aten.full.default, [1] * ndim, 1.0, dtype=value(like).dtype, device=value(like).device)

    def whole(x: fx.Node) -> fx.Node:
        for _ in range(ndim - len(shape(x))):
            x = emit.call(aten.unsqueeze.default, x, 0)
        if shape(x)[-1] != 1:
            return x
        return emit.call(aten.expand.default, x, [*(-1 for _ in range(ndim - 1)), emit.size(like, ndim - 1)])

    left, right = list[fx.Node](), list[fx.Node]()
    for part in (part.of_sides(emit) for part in found):
        first, second = (one if x is None else x for x in (part.left, part.right))
        first = first if part.factor == 1 else emit.call(aten.mul.Tensor, first, part.factor)
        first, second = whole(first), whole(second)
        if part.right is None:
            first, second = emit.call(aten.sum.dim_IntList, first, [-1], True), one
        elif part.left is None:
            second = emit.call(aten.mul.Tensor, emit.call(aten.sum.dim_IntList, second, [-1], True), part.factor)
            first = one
        left.append(first)
        right.append(second)
    return _joined(emit, left), _joined(emit, right)


def _joined(emit: Emitter, parts: list[fx.Node]) -> fx.Node:
    """Along the last axis; shorter ones are repeated along the others."""
    if len(parts) == 1:
        return parts[0]
    longest = [max(parts, key=lambda n: shape(n)[axis]) for axis in range(len(shape(parts[0])) - 1)]

    def repeated(n: fx.Node) -> fx.Node:
        is_short = [shape(n)[axis] != shape(most)[axis] for axis, most in enumerate(longest)]
        sizes = [emit.size(longest[axis], axis) if short else -1 for axis, short in enumerate(is_short)]
        return emit.call(aten.expand.default, n, [*sizes, -1]) if any(is_short) else n

    return emit.call(aten.cat.default, list(map(repeated, parts)), -1)
