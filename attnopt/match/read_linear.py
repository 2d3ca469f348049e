"""An attention without a softmax, from the two products that are its anchor: which tensors are queries, keys and values.

(Q K^T) V and Q (K^T V) are the same chain of products, read from either end: the tensor in the middle has the keys, and the
weights of its projection tell their features from tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from attnopt.graph.axes import Atom, Axes, Axis, resolve, resolve_all
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import ancestors
from attnopt.ir.refusal import Refusal
from attnopt.match.axis_roles import is_feature, is_of_weights
from attnopt.match.chains import Chain
from attnopt.match.inside import between, escaping, unify
from attnopt.match.linear_operands import behind, refuse_constants, refuse_dependent, refuse_pieces
from attnopt.match.read_chain import ChainWeights, read_chain
from attnopt.match.read_scores import Operand
from attnopt.match.region import Region, atoms_of
from attnopt.match.rejection import NotAttentionError, rejected
from attnopt.match.row_quotient import RowQuotient, Sides, late_quotient_of


@dataclass(frozen=True)
class _Parts:
    q: Operand
    k: Operand
    v: Operand
    features: Axis
    keys: Axis
    value_features: Axis
    pairs_first: bool = False  # (Q K^T) V
    renamed: Mapping[Atom, Atom] = field(default_factory=dict)  # tokens of queries, where they are those of keys


def from_chain(chain: Chain) -> Region:
    """Axes have no roles yet.  Raises NotAttentionError."""
    first, second = chain.first, chain.second
    weights = read_chain(chain, Sides(chain.path, behind(first.left), behind(first.right)))
    unify(second.left_axes, weights.axes, second.node)
    parts = _parts(chain, weights)
    refuse_dependent(parts.q, parts.k, parts.v)
    sides = Sides(chain.path if parts.pairs_first else (), behind(parts.q.node), behind(parts.k.node))
    late = late_quotient_of(second.node, second.axes, sides)
    if weights.quotient is not None and (late is not None or not parts.pairs_first):
        raise _no_attention(second.node, "weights that are divided once", "two divisions")
    quotient, out = weights.quotient, _renamed(second.node, second.axes, parts)
    if late is not None:
        quotient, out = late[0], _renamed(late[0].node, late[1], parts)
    path = tuple(between(first.node, out.node))
    _refuse_other_factors(weights, path, parts)
    refuse_pieces(parts.q, parts.k, parts.v, {*path, *_above(quotient, sides)})
    refuse_constants(parts.v)
    frames = (
        (first.node, first.axes),
        *weights.frames,
        (first.left, first.left_axes),
        (first.right, first.right_axes),
        (parts.q.node, parts.q.axes),
        *(() if parts.renamed else ((second.right, second.right_axes), (second.node, second.axes))),
        (out.node, out.axes),
    )
    return Region(
        q=parts.q,
        k=parts.k,
        v=parts.v,
        out=out,
        scale=weights.scale,
        batch=(),
        heads=(),
        queries=(),
        keys=parts.keys,
        features=parts.features,
        value_features=parts.value_features,
        factors=weights.factors,
        linear=replace(weights, quotient=quotient),
        nodes=path,
        escapes=escaping(path, out.node),
        frames=frames,
        anchor=second.node,
    )


def between_tokens(r: Region) -> Region:
    """``r``, whose axes have roles.  Raises NotAttentionError."""
    made = any(is_of_weights(o, atom) for o in (r.k, r.v) for atom in r.keys)
    if made or r.between_channels or not r.queries:
        raise _no_attention(r.out.node, "queries and keys that are tokens", "features, or places of a weight")
    return r


def _parts(chain: Chain, weights: ChainWeights) -> _Parts:
    """Raises NotAttentionError."""
    if weights.running:
        return _running_parts(chain, weights)
    first, second = chain.first, chain.second
    left, right, result = (atoms_of(x) for x in (first.left_axes, first.right_axes, first.axes))
    made, other, out = (atoms_of(x) for x in (second.left_axes, second.right_axes, second.axes))
    inner, summed = (left & right) - result, (made & other) - out
    if not inner or not summed or not (summed <= right - left or summed <= left - right):
        raise _no_attention(second.node, "a chain of two products", "products over other axes")
    outer, middle = Operand(first.left, first.left_axes), Operand(first.right, first.right_axes)
    if not summed <= right:
        outer, middle = middle, outer
    last = Operand(second.right, second.right_axes)
    inner_axis, summed_axis = _ordered(middle, inner), _ordered(middle, summed)
    of_outer = _ordered(outer, result - atoms_of(middle.axes))
    of_last = _ordered(last, out - made)
    by_pairs = _are_features((outer, inner_axis), (middle, inner_axis), (last, of_last))
    by_state = _are_features((outer, of_outer), (middle, summed_axis), (last, summed_axis))
    if by_pairs == by_state:
        by_pairs = any(summed & atoms and set(of_outer) & atoms for atoms in _atoms_between(weights))
        by_state = False
    if by_pairs:
        return _Parts(outer, middle, last, inner_axis, summed_axis, of_last, pairs_first=True)
    if not by_state:
        raise _no_attention(second.node, "features that weights tell from tokens", "axes of unknown kind")
    return _Parts(last, middle, outer, summed_axis, inner_axis, of_outer)


def _running_parts(chain: Chain, weights: ChainWeights) -> _Parts:
    """Of queries that meet the sums of all k v^T up to their own token.  Raises NotAttentionError."""
    first, second, tokens = chain.first, chain.second, set(resolve(weights.running))
    left, right, result = (atoms_of(x) for x in (first.left_axes, first.right_axes, first.axes))
    made, other, out = (atoms_of(x) for x in (second.left_axes, second.right_axes, second.axes))
    summed = (made & other) - out
    is_outer = (left & right) <= result and bool(tokens) and tokens <= left & right & other & out
    if not is_outer or not summed or not (summed <= right - left or summed <= left - right):
        raise _no_attention(second.node, "sums of products of keys and values", "sums of something else")
    k, v = Operand(first.left, first.left_axes), Operand(first.right, first.right_axes)
    if not summed <= left:
        k, v = v, k
    features = _ordered(k, summed)
    if not _are_features((k, features), (Operand(second.right, second.right_axes), features)):
        raise _no_attention(second.node, "features that weights tell from tokens", "axes of unknown kind")
    of_queries = {a: Atom(a.size, a.name) for a in tokens}
    q = Operand(second.right, _in_terms(second.right_axes, of_queries))
    return _Parts(q, k, v, features, _ordered(k, tokens), _ordered(v, result - atoms_of(k.axes)), renamed=of_queries)


def _renamed(node: fx.Node, axes: Axes, parts: _Parts) -> Operand:
    return Operand(node, _in_terms(axes, parts.renamed))


def _in_terms(axes: Axes, names: Mapping[Atom, Atom]) -> Axes:
    return tuple(tuple(names.get(a, a) for a in axis) for axis in resolve_all(axes))


def _ordered(o: Operand, atoms: set[Atom]) -> Axis:
    return tuple(c for axis in resolve_all(o.axes) for c in axis if c in atoms)


def _are_features(*told: tuple[Operand, Axis]) -> bool:
    """One of these axes has the features of a projection alone."""
    return any(axis and all(is_feature(o, c) for c in axis) for o, axis in told)


def _atoms_between(weights: ChainWeights) -> list[set[Atom]]:
    """Of each tensor and triangle that tells elements of the first product apart."""
    of_tensors = [*(f.axes for f in weights.factors), *(h.condition.axes for h in weights.hides)]
    return [atoms_of(axes) for axes in (*of_tensors, *((t.rows, t.columns) for t in weights.triangles))]


def _refuse_other_factors(weights: ChainWeights, path: tuple[fx.Node, ...], parts: _Parts) -> None:
    """Factors of features, factors that the scores make, and those that inputs make for each pair."""
    inside, features = set(path), {*parts.features, *parts.value_features}
    given = [*(f for f in weights.factors), *(h.condition for h in weights.hides)]
    if any(o.node in inside for o in given) or any(features & atoms for atoms in _atoms_between(weights)):
        raise _no_attention(parts.k.node, "factors of pairs of queries and keys", "a factor of features or of scores")
    for factor in weights.factors:
        atoms = atoms_of(factor.axes)
        of_queries = atoms - atoms_of(parts.k.axes)
        if atoms & set(parts.keys) and of_queries & atoms_of(parts.q.axes) and inputs_behind(factor.node):
            raise rejected(
                factor.node,
                "data-dependent-decay",
                "a decay that is the same for all inputs",
                f"{factor.node.name}, which inputs change from pair to pair, as in Mamba-2 and gated linear attention",
            )


def _above(quotient: RowQuotient | None, sides: Sides) -> set[fx.Node]:
    """What computes the sums that divide."""
    return set() if quotient is None else set(ancestors(quotient.node, stop=sides.every.__contains__))


def _no_attention(node: fx.Node, expected: str, found: str) -> NotAttentionError:
    return NotAttentionError(Refusal("no-attention", expected, found), node, near=False)
