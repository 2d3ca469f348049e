"""Queries, keys and values of an attention without a softmax, told from those of states, delta rules and Gram matrices."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from attnopt.graph.axes import FOLLOWED
from attnopt.graph.cleanup import computes_same
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import ancestors, calls, is_number, operand, opname
from attnopt.graph.ops import LAYOUT, Kind, is_pointwise, named, of
from attnopt.graph.products import product_of
from attnopt.ir.refusal import Refusal
from attnopt.match.fused import FUSED
from attnopt.match.read_scores import Operand
from attnopt.match.rejection import NotAttentionError, rejected

_PROJECTS = of(Kind.PRODUCT, Kind.CONVOLUTION, Kind.EMBEDDING, Kind.NORM)
_NORMALISES = of(Kind.SOFTMAX, Kind.LOG_SOFTMAX) | FUSED
_RUNNING = named("cumsum cumprod logcumsumexp cummax cummin")
_PADS, _JOINS = of(Kind.PAD), of(Kind.JOIN)
_PASSED = of(*LAYOUT)


def behind(node: fx.Node) -> tuple[fx.Node, ...]:
    """``node`` and those above it that have the same numbers."""
    found = [node]
    while found[-1].target in FOLLOWED:
        found.append(operand(found[-1]))
    return tuple(found)


def refuse_dependent(q: Operand, k: Operand, v: Operand) -> None:
    """Raise NotAttentionError if one is another of them, or made by more than projections of tokens and functions of these."""
    roots = [behind(o.node)[-1] for o in (q, k, v)]
    if any(computes_same(a, b) for i, a in enumerate(roots) for b in roots[:i]):
        refusal = Refusal("no-attention", "queries, keys and values that differ", "products of one tensor with itself")
        raise NotAttentionError(refusal, k.node, near=False)
    above = [n for root in roots for n in ancestors(root, stop=_ends) if inputs_behind(n)]
    for node in above:
        if calls(node, _RUNNING):
            raise rejected(
                node,
                "data-dependent-decay",
                "queries and keys that do not depend on other tokens",
                f"{opname(node)} over them, as in gated linear attention",
            )
        if _is_of_activations(node):
            refusal = rejected(
                node,
                "nested-products",
                "queries, keys and values made by projections",
                f"a product of activations in them, {node.name}, as in a delta rule or a recurrence",
            ).refusal
            is_known = any(calls(n, _NORMALISES) for n in above)  # of a softmax attention
            raise NotAttentionError(refusal, node, near=not is_known)


def refuse_constants(v: Operand) -> None:
    """Raise NotAttentionError if some of the values are constants."""
    root = behind(v.node)[-1]
    if _has_constants(root):
        found = f"{opname(root)} of them with constants, as with ones whose sum divides"
        raise rejected(root, "other-normaliser", "values that a projection makes", found)


def refuse_pieces(q: Operand, k: Operand, v: Operand, inside: Collection[fx.Node]) -> None:
    """Raise NotAttentionError if one of them also meets others in a product outside: as a state, chunk by chunk."""
    stack = [n for o in (q, k, v) for n in behind(o.node)]
    seen = set(stack)
    while stack:
        for user in stack.pop().users:
            if user in seen or user in inside:
                continue
            seen.add(user)
            if _is_of_activations(user):
                raise rejected(
                    user,
                    "in-pieces",
                    "queries, keys and values that one attention alone reads",
                    f"{user.name} = {opname(user)}, as of a state beside the pairs of a chunk",
                )
            if calls(user, _PASSED) or is_pointwise(user.target):
                stack.append(user)


def _is_of_activations(node: fx.Node) -> bool:
    found = product_of(node)
    if found is None or found.left is found.right:  # a sum of squares
        return False
    return all(map(inputs_behind, (found.left, found.right)))


def _has_constants(node: fx.Node) -> bool:
    if calls(node, _JOINS):
        return not all(inputs_behind(n) for n in node.all_input_nodes)
    return calls(node, _PADS)


def _ends(node: fx.Node) -> bool:
    """A projection, a norm, or a size."""
    return is_number(node) or (calls(node, _PROJECTS) and not _is_of_activations(node))
