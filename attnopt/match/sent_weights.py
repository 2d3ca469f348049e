"""A softmax over queries: each key divides its value among them (reversed attention, arXiv:2304.03282).

In the model's own words, the tokens that send are the queries of its scores.  Read as an attention, they are the keys: what is
summed.
"""

from __future__ import annotations

import math

from attnopt.graph.axes import Axis, resolve_all
from attnopt.graph.products import Product
from attnopt.match.mask_patterns import may_hide
from attnopt.match.read_scores import Hide, Term
from attnopt.match.region import Region, atoms_of
from attnopt.match.rejection import NotAttentionError, rejected

_LOST = -1e4  # a score is negligible next to another with this addend


def senders(scores: Product, values: Product, receivers: Axis) -> Axis:
    """What ``values``, a product of weights and values, sums over, where the softmax is over ``receivers``; empty if these are no
    tokens that have nothing to do with each other.  The left operand of ``scores`` has no ``receivers``."""
    left, right = atoms_of(scores.left_axes), atoms_of(scores.right_axes)
    out, of_values = atoms_of(values.axes), atoms_of(values.right_axes)
    summed = (atoms_of(values.left_axes) & of_values) - out
    if not summed <= left - right or not set(receivers) <= out - of_values:
        return ()
    return tuple(c for axis in resolve_all(scores.left_axes) for c in axis if c in summed)


def over_queries(r: Region) -> Region:
    """``r``, whose axes have roles.  Raises NotAttentionError if a softmax over queries is beside what only one over keys knows,
    or if a number hides: it would matter where a key hides from all queries."""
    if not r.sends:
        return r
    others = {
        "a sink": r.sinks is not None or r.sink_value is not None,
        "a map across heads": r.score_map is not None or r.weight_map is not None,
        "weights that are multiplied": r.weight_factor is not None,
        "weights that are mixed with a map": r.mixture is not None,
        "attention between channels": r.between_channels,
        "no queries": not r.queries,
    }
    if (found := next((name for name, there in others.items() if there), None)) is not None:
        expected = "scores of tokens, biases and masks of -inf beside a softmax over queries"
        raise rejected(r.out.node, "softmax-over-queries", expected, found)
    for step in r.steps:
        if isinstance(step, Hide) and step.fill != -math.inf:
            raise _by_number(r, f"{step.fill:g} written over scores")
        if isinstance(step, Term) and step.operand is not None and may_hide(step.operand.node, _LOST):
            raise _by_number(r, f"{step.operand.node.name}, which is added and may hide")
    return r


def _by_number(r: Region, found: str) -> NotAttentionError:
    expected = "masks of -inf beside a softmax over queries"
    hint = "write -inf where a mask hides, by masked_fill or where"
    return rejected(r.out.node, "softmax-over-queries", expected, found, hint)
