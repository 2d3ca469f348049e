"""Recognize an attention around a softmax anchor: its queries, keys, values and output, and their axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

from torch import fx

from attnopt.graph.axes import FOLLOWED, Axes, Axis, follow, length, resolve, resolve_all
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import aten, calls, is_call, is_tensor, opname, shape, source_line
from attnopt.graph.ops import named
from attnopt.graph.products import Product, product_of
from attnopt.ir.refusal import Refusal
from attnopt.match.anchors import Softmax
from attnopt.match.axis_roles import assign_roles
from attnopt.match.chains import Chain
from attnopt.match.fused import from_fused
from attnopt.match.head_maps import HeadMap, head_map, maps_heads
from attnopt.match.inside import between, escaping, unify
from attnopt.match.late_division import LateQuotient, late_quotient
from attnopt.match.mixed_weights import is_mixing, mixes, read_mixture
from attnopt.match.mixture import Mixture
from attnopt.match.overwrites import zeros_of
from attnopt.match.read_linear import between_tokens, from_chain
from attnopt.match.read_scores import (
    MAX_DEPTH,
    Hide,
    Operand,
    Scores,
    Step,
    Term,
    hiding,
    is_projected,
    is_query_key,
    read_scores,
)
from attnopt.match.region import Region, atoms_of
from attnopt.match.rejection import NotAttentionError, rejected, unreadable, weights_changed
from attnopt.match.row_sums import renormalises
from attnopt.match.sent_weights import over_queries, senders
from attnopt.match.weight_factors import factor_of
from attnopt.match.zeroed_weights import cleans, with_zeros

_CHANGING = named("mul masked_fill add where cat")
_NEAR = 8  # operators within which a product makes a softmax a near miss; farther ones belong to another layer


def recognise(anchor: Softmax | Chain | fx.Node) -> Region:
    """The attention around ``anchor``.  Raises NotAttentionError."""
    if isinstance(anchor, Chain):
        return between_tokens(assign_roles(from_chain(anchor)))
    if isinstance(anchor, Softmax):
        return over_queries(assign_roles(_from_softmax(anchor)))
    return assign_roles(from_fused(anchor))


def _from_softmax(a: Softmax) -> Region:
    follows = _follow_weights(a)
    try:
        scores = read_scores(a.scores, a.axis, a.rate)
    except NotAttentionError as e:
        raise NotAttentionError(e.refusal, e.node, near=follows is not None or _comes_from_product(a)) from None
    if follows is None:
        raise _without_values(a.weights)
    if a.beside is not None:
        joined = scores.with_sink(math.log(a.beside))
        if joined is None:
            raise unreadable(a.weights, "one sink beside the scores")
        scores = joined
    product, quotient, inner = follows
    keys = resolve(scores.axes[a.axis])
    scores = _orient(scores, keys, a)
    mixture = None if inner is not None else _mixture_of(product.left, a, scores)
    if mixture is not None:
        weights_axes, zeroed, factors, mapped = mixture.axes, dict[fx.Node, Hide](), list[Operand](), None
    else:
        weights_axes, zeroed, factors, mapped = _through(inner or (), scores.axes, a.axis)
    unify(product.left_axes, weights_axes, product.node)
    out = Operand(product.node, product.axes) if quotient is None else quotient.divided(product, scores.axes, a.axis)
    path = tuple(between(scores.product.node, out.node))
    scores = replace(scores, steps=_without_shifts(scores, set(path), keys))
    steps = _with_zeros(scores, a, keys, zeroed)
    if steps is None and a.late_sum is None:  # zeros unlike the mask of the scores: a factor of 0 and 1
        factors = [*factors, *_factors_of(zeroed, inner or (), scores.axes)]
        steps = _with_zeros(scores, a, keys, {})
    if steps is None or len(factors) > 1:
        raise weights_changed(next(iter(zeroed), product.node))
    scores = replace(scores, steps=steps)
    region = _assemble(a, scores, product, keys, out, path)
    return replace(region, weight_factor=next(iter(factors), None), mixture=mixture, weight_map=mapped)


def _mixture_of(weights: fx.Node, a: Softmax, scores: Scores) -> Mixture:
    """Raises NotAttentionError."""
    sums_to_one = not scores.has_sink and a.masked is None
    found = read_mixture(weights, a.weights, scores.axes, a.axis, sums_to_one)
    if found is None:
        raise weights_changed(weights)
    return found


def _without_values(weights: fx.Node) -> NotAttentionError:
    user = next(iter(weights.users), None)
    used = "no use" if user is None else f"{user.name} = {opname(user)}"
    refusal = Refusal("no-value-product", "weights multiplied with values", used, source_line(weights))
    return NotAttentionError(refusal, user)


def _follow_weights(a: Softmax) -> tuple[Product, LateQuotient | None, tuple[fx.Node, ...] | None] | None:
    """(product with the values, oriented so that its left operand is the weights; the late division, if there is one; the
    nodes from the weights to the product, None if they are mixed with a map), or None without a path to a product over the
    keys."""
    paths: list[tuple[fx.Node, ...]] = [(a.weights,)]
    changed: fx.Node | None = None
    for path in paths:  # it grows
        for user in path[-1].users:
            if (found := _with_values(a, path[-1], user)) is not None:
                return *found, path
            if _carries_on(a, path[-1], user) and len(path) < MAX_DEPTH:
                paths.append((*path, user))
            elif calls(user, _CHANGING):
                changed = changed or user
    if (product := _product_of_mixture(a)) is not None:
        return product, None, None
    if changed is not None and _leads_to_product(changed):
        raise weights_changed(changed)
    return None


def _product_of_mixture(a: Softmax) -> Product | None:
    """The product with the values of weights that may be mixed with a map."""
    reached = [] if a.late_sum is not None else [a.weights]
    for node in reached:  # it grows
        for user in node.users:
            found = _with_values(a, node, user)
            if found is not None and mixes(node, a.weights):
                return found[0]
            follows = is_mixing(user) or user.target in FOLLOWED
            if follows and user not in reached and len(reached) < MAX_DEPTH:
                reached.append(user)
    return None


def _with_values(a: Softmax, weights: fx.Node, user: fx.Node) -> tuple[Product, LateQuotient | None] | None:
    """The product of ``weights`` and values that ``user`` computes, and the division by a sum that follows it."""
    product = _product_with(weights, user)
    if product is None or product.addend is not None:
        return None
    oriented = product if product.left is weights else product.swapped()
    if oriented.left is oriented.right or not (inputs_behind(oriented.right) or is_projected(oriented.right)):
        return None
    if a.late_sum is None:
        return oriented, None
    quotient = late_quotient(product.node, a.late_sum)
    return None if quotient is None else (oriented, quotient)


def _carries_on(a: Softmax, weights: fx.Node, user: fx.Node) -> bool:
    """``user`` gives weights, too: in another layout, normalised again, with zeros where a mask hides keys, times a factor that
    is known, or mapped across heads."""
    is_whole = a.late_sum is None and a.beside is None
    if is_whole and weights is a.weights and renormalises(user, a.weights, a.axis):
        return True
    zeroes = zeros_of(user, weights) is not None or (cleans(user, weights) and not a.may_overflow)
    is_changed = factor_of(user, weights) is not None or maps_heads(user, weights)
    return zeroes or (a.late_sum is None and is_changed) or user.target in FOLLOWED


def _product_with(weights: fx.Node, user: fx.Node) -> Product | None:
    """The product that ``user`` computes, or whose factors it multiplies one by one before they are summed.

    The latter only if the other factor has its own axes: a sum of weights times a mask is not a mixture of values.
    """
    if not is_call(user, aten.mul.Tensor):
        return product_of(user)
    for total in user.users:
        product = product_of(total)
        if product is None or user in (product.left, product.right):
            continue
        left, right = atoms_of(product.left_axes), atoms_of(product.right_axes)
        if (right - left) if product.left is weights else (left - right):
            return product
    return None


def _comes_from_product(a: Softmax) -> bool:
    """A product over as many keys is a few operators above: an attention with modified scores."""
    keys = shape(a.scores)[a.axis]
    frontier = [a.scores]
    for _ in range(_NEAR):
        frontier = [i for n in frontier for i in n.all_input_nodes if is_tensor(i)]
        if any(keys in shape(n) and (p := product_of(n)) is not None and is_query_key(p) for n in frontier):
            return True
    return False


def _leads_to_product(node: fx.Node) -> bool:
    frontier = [node]
    for _ in range(_NEAR):
        frontier = [u for n in frontier for u in n.users]
        if any(product_of(u) is not None for u in frontier):
            return True
    return False


def _through(
    path: tuple[fx.Node, ...], axes: Axes, axis: int
) -> tuple[Axes, dict[fx.Node, Hide], list[Operand], HeadMap | None]:
    """Axes at the end of ``path``, whose first node has ``axes``, the nodes in between that write zeros, other factors, and a map
    across heads.

    A slice that drops the column of a sink is skipped.
    """
    zeroed: dict[fx.Node, Hide] = {}
    factors: list[Operand] = []
    mapped: HeadMap | None = None
    for before, node in pairwise(path):
        if (found_map := head_map(node, before, axes)) is not None:
            if mapped is not None:
                raise weights_changed(node)
            mapped, axes = found_map
            continue
        if cleans(node, before) or renormalises(node, before, axis):
            continue
        if (zeros := zeros_of(node, before)) is not None:
            if (hide := hiding(zeros, axes)) is None:
                raise weights_changed(node)
            zeroed[node] = hide
            continue
        if (factor := factor_of(node, before, axes)) is not None:
            factors.append(factor)
            continue
        if is_call(node, aten.slice.Tensor) and shape(node) == tuple(length(x) for x in resolve_all(axes)):
            continue
        found = follow(node, axes)
        if found is None:
            raise unreadable(node, "weights with traceable axes")
        axes = found
    if mapped is not None and (zeroed or factors):
        raise weights_changed(mapped.weight)
    return resolve_all(axes), zeroed, factors, mapped


def _with_zeros(scores: Scores, a: Softmax, keys: Axis, zeroed: Mapping[fx.Node, Hide]) -> tuple[Step, ...] | None:
    """The steps of the scores if weights are ``zeroed`` before or after division by their sum; None if no mask does that."""
    steps = scores.steps
    if a.masked is not None:
        exponentials, masked = a.masked
        zeros = zeros_of(masked, exponentials)
        hide = None if zeros is None else hiding(zeros, scores.axes)
        if hide is None:
            raise weights_changed(masked)
        steps = (*steps, replace(hide, fill=-math.inf))
    return with_zeros(steps, tuple(zeroed.values()), a, scores.axes, keys)


def _factors_of(zeroed: Mapping[fx.Node, Hide], path: tuple[fx.Node, ...], axes: Axes) -> list[Operand]:
    """What the nodes that write zeros multiply by.  Raises NotAttentionError."""
    before = {node: above for above, node in pairwise(path)}
    found = {node: factor_of(node, before[node], axes) for node in zeroed}
    unknown = next((node for node, factor in found.items() if factor is None), None)
    if unknown is not None:
        raise weights_changed(unknown)
    return [factor for factor in found.values() if factor is not None]


def _orient(scores: Scores, keys: Axis, a: Softmax) -> Scores:
    """Make the right operand the one that has the keys."""
    p = scores.product
    left, right = ({c for ax in resolve_all(x) for c in ax} for x in (p.left_axes, p.right_axes))
    if not keys:
        raise rejected(a.weights, "one-key", "more than one key", "a softmax over a single element")
    if set(keys) <= right and not set(keys) & left:
        return scores
    if set(keys) <= left and not set(keys) & right:
        return replace(scores, product=p.swapped())
    raise rejected(
        a.weights, "softmax-axis", "a softmax over an axis of the keys alone", "an axis shared by both operands"
    )


def _assemble(
    a: Softmax, scores: Scores, product: Product, keys: Axis, out: Operand, path: tuple[fx.Node, ...]
) -> Region:
    p = scores.product
    frame = atoms_of(scores.axes)
    features = [c for ax in resolve_all(p.left_axes) for c in ax if c not in frame]
    v_atoms, weights = atoms_of(product.right_axes), atoms_of(product.left_axes)
    contracted = weights & v_atoms - atoms_of(product.axes)
    sending = () if contracted == set(keys) else senders(p, product, resolve(keys))
    if contracted != {*(sending or keys)}:
        raise rejected(product.node, "value-axis", "values summed over the keys", "a product over another axis")
    q = p.swapped() if sending else p  # left: the queries, which the output has
    value_features = [c for ax in resolve_all(product.axes) for c in ax if c not in weights]
    _refuse_self_dependence(scores, path)
    escapes = escaping(path, out.node)
    frames = (
        *scores.frames,
        (p.left, p.left_axes),
        (p.right, p.right_axes),
        (product.right, product.right_axes),
        (product.node, product.axes),
        (out.node, out.axes),
    )
    return Region(
        q=Operand(q.left, resolve_all(q.left_axes)),
        k=Operand(q.right, resolve_all(q.right_axes)),
        v=Operand(product.right, resolve_all(product.right_axes)),
        out=Operand(out.node, resolve_all(out.axes)),
        scale=scores.scale,
        batch=(),
        heads=(),
        queries=(),
        keys=sending or resolve(keys),
        sends=bool(sending),
        features=tuple(features),
        value_features=tuple(value_features),
        steps=scores.steps,
        factors=scores.factors,
        wipes=scores.wipes,
        softcap=scores.softcap,
        clamp=scores.clamp,
        sinks=scores.sinks,
        sink_value=scores.sink_value,
        score_map=scores.score_map,
        sink_rate=scores.sink_rate,
        nodes=path,
        escapes=escapes,
        frames=frames,
        anchor=a.weights,
    )


def _without_shifts(scores: Scores, inside: set[fx.Node], keys: Axis) -> tuple[Step, ...]:
    """The steps that affect a softmax: without terms from the scores that are equal for all keys, such as the row maximum.

    A sink that joins later would see it, too.
    """
    seen_by_sinks = scores.before_sinks if scores.has_sink else 0

    def shifts(i: int, step: Step) -> bool:
        if not isinstance(step, Term) or step.operand is None or i < seen_by_sinks:
            return False
        return step.operand.node in inside and not atoms_of(step.operand.axes) & set(keys)

    return tuple(s for i, s in enumerate(scores.steps) if not shifts(i, s))


def _refuse_self_dependence(scores: Scores, path: Iterable[fx.Node]) -> None:
    """A mask or bias derived from the scores that it changes (top-k, smoothing) is not a mask or bias.

    ``path`` is everything between the product and the output, so the inputs of such an operand are on it, too.
    """
    inside = set(path)
    operands = [s.operand if isinstance(s, Term) else s.condition for s in scores.steps if isinstance(s, (Term, Hide))]
    for given in (*operands, *scores.factors, *scores.wipes):
        if given is not None and given.node in inside:
            raise rejected(
                given.node,
                "scores-feed-back",
                "masks and biases independent of the scores",
                f"{given.node.name}, which depends on the scores",
            )
