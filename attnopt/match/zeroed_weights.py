"""Zeros written over softmax weights of masked keys.

Speech models mask the scores and then the weights again, so a fully masked query gives zeros; others replace
the 0 / 0 of such a row by zeros.  Both match the semantics of a mask in an ``AttentionSpec``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from attnopt.graph.axes import Axes, Axis, length, resolve_all, unfollow
from attnopt.graph.cleanup import computes_same
from attnopt.graph.nodes import CASTS, NOT, arg, aten, calls, dtype, is_call, is_tensor, operand, shape, wrap
from attnopt.graph.ops import FACTORS
from attnopt.match.anchors import Softmax
from attnopt.match.mask_patterns import may_hide
from attnopt.match.overwrites import zeros_of
from attnopt.match.read_scores import Hide, Mapped, Operand, Step, Term
from attnopt.match.region import atoms_of


def cleans(node: fx.Node, weights: fx.Node) -> bool:
    """``node`` is ``weights`` with NaN replaced by 0."""
    if is_call(node, aten.nan_to_num.default):
        return arg(node, 0) is weights and not arg(node, 1)
    zeros = zeros_of(node, weights)
    if zeros is None:
        return False
    is_nan = is_call(zeros.condition, aten.isnan.default) and arg(zeros.condition, 0) is weights
    return is_nan and zeros.when


def with_zeros(
    steps: Sequence[Step], zeroed: Sequence[Hide], a: Softmax, frame: Axes, keys: Axis
) -> tuple[Step, ...] | None:
    """The steps of an attention whose weights are ``zeroed``; None if that removes weight from visible keys.

    A row that is zeroed whole is a query that sees no key.  Where all that is written over the scores is zeroed in the
    weights too, it is fully hidden, whatever number was written.
    """
    left = [z for z in zeroed if not _is_undefined(z, a, frame, keys)]
    if not left:
        return tuple(steps)
    rows = [z for z in left if not atoms_of(z.condition.axes) & set(keys)]
    hides = {i: s for i, s in enumerate(steps) if isinstance(s, Hide)}
    hidden: dict[int, Hide] = {}
    for z in left:
        same = {i: replace(h, fill=-math.inf) for i, h in hides.items() if _mean_the_same(h, z)}
        if z not in rows and not same:
            return None
        hidden |= same
    seen = (i not in hidden or _is_seen(steps, h.fill) for i, h in hides.items() if h.fill != -math.inf)
    if len(rows) < len(left) and any(seen):
        return None
    return (*(hidden.get(i, s) for i, s in enumerate(steps)), *(replace(z, fill=-math.inf) for z in rows))


def _is_seen(steps: Sequence[Step], fill: float) -> bool:
    """Next to the other steps, a score of ``fill`` may still have weight."""
    if any(isinstance(s, Mapped) for s in steps):  # what was added before may be larger now
        return True
    return any(isinstance(s, Term) and s.operand is not None and may_hide(s.operand.node, fill) for s in steps)


def _mean_the_same(a: Hide, b: Hide) -> bool:
    (node, *place), (other, *where) = _root(a), _root(b)
    return place == where and computes_same(node, other)


def _root(h: Hide) -> tuple[fx.Node, Axes, bool]:
    """The tensor before casts, negations and layout changes, its axes, and whether 0 or nonzero hides."""
    node, axes, when = h.condition.node, resolve_all(h.condition.axes), h.when
    while True:
        if calls(node, NOT) and dtype(node) == torch.bool:
            node, when = operand(node), not when
        elif is_call(node, aten.eq.Scalar, aten.ne.Scalar) and arg(node, 1) == 0:
            when ^= is_call(node, aten.eq.Scalar)
            node = operand(node)
        elif calls(node, FACTORS) or _rounds(node):
            return node, axes, when
        elif (above := unfollow(node, axes)) is not None:
            node, axes = above
        else:
            return node, axes, when


def _rounds(node: fx.Node) -> bool:
    return calls(node, CASTS) and dtype(operand(node)).is_floating_point and dtype(node) != torch.bool


def _of_all_keys(z: Hide, keys: Axis) -> Hide | None:
    """The condition on single keys that must hold for a whole row."""
    node, axes, when = _root(z)
    if not is_call(node, aten.all.dim if when else aten.any.dim):
        return None
    x, keepdim = operand(node), bool(arg(node, 2, False))
    at = wrap(arg(node, 1), len(shape(x)))
    axes = (*axes[:at], keys, *axes[at + keepdim :])
    if len(axes) != len(shape(x)) or shape(x)[at] != length(keys):
        return None
    return Hide(Operand(x, axes), when, z.fill)


def _is_undefined(z: Hide, a: Softmax, frame: Axes, keys: Axis) -> bool:
    """Only weights that are not numbers are zeroed: 0 / 0, of a row whose scores are all -inf."""
    single = _of_all_keys(z, keys)
    if single is None:
        return False
    node, axes, when = _root(single)
    infinite = is_call(node, aten.isneginf.default) or (is_call(node, aten.eq.Scalar) and arg(node, 1) == -math.inf)
    return infinite and when and axes == resolve_all(frame) and _uncast(operand(node)) is _uncast(a.scores)


def _uncast(node: fx.Node) -> fx.Node:
    while calls(node, CASTS) and is_tensor(arg(node, 0)):
        node = operand(node)
    return node
