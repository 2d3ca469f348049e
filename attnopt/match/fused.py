"""An attention that is already one operator: torch's ``scaled_dot_product_attention``, or attnopt's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnopt.backends.attention_operator import ATTENTION
from attnopt.graph.axes import Axes, Axis, broadcast, fresh, reshape, resolve_all
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, dtype, is_call, shape
from attnopt.graph.ops import Kind, of
from attnopt.graph.sdpa import SDPA, call_arguments, sdpa_arguments
from attnopt.match.read_scores import Hide, Operand, Step, Term
from attnopt.match.region import Region
from attnopt.match.rejection import rejected, unreadable
from attnopt.patterns import parse

FUSED = of(Kind.ATTENTION) | {ATTENTION}
_AT_RUN_TIME = ("selected", "wanted", "q_segments", "kv_segments", "pairs")


def is_fused(node: fx.Node) -> bool:
    """Attnopt's operator only where its pattern says which pairs it computes, and no tensor does."""
    if is_call(node, ATTENTION):
        given = call_arguments(node)
        return all(given[name] is None for name in _AT_RUN_TIME)
    return is_call(node, SDPA)


def from_fused(node: fx.Node) -> Region:
    """The attention of a call for which ``is_fused``.  Raises NotAttentionError."""
    return _from_operator(node) if is_call(node, ATTENTION) else _from_sdpa(node)


def _from_sdpa(node: fx.Node) -> Region:
    given = sdpa_arguments(node)
    q, k, v, mask = given.query, given.key, given.value, given.attn_mask
    if given.dropout_p:
        found = f"dropout of {given.dropout_p}"
        raise rejected(node, "active-dropout", "no active dropout", found, "call model.eval() first")
    if given.scale is None:
        raise unreadable(node, "a scale that is a number")
    sq, sk, sv = shape(q), shape(k), shape(v)
    ndim = len(sq)
    lead, rows, columns = _frame(q, k)
    kv_lead = [ax if s != 1 else () for s, ax in zip(sk[:-2], lead[ndim - len(sk) :], strict=True)]
    if given.enable_gqa and sk[-3] != sq[-3]:
        kv_lead[-1] = _groups(lead[-1], sk[-3], sq[-3])
    if len(sk) != len(sv) or sk[:-2] != sv[:-2] or len(sk) > ndim:
        raise unreadable(node, "keys and values with the same leading axes")
    steps = () if mask is None else (_masking(node, mask, (*lead, rows, columns)),)
    is_causal = given.is_causal
    return _region(node, (q, k, v), lead, kv_lead, rows, columns, given.scale, steps=steps, top_left_causal=is_causal)


def _from_operator(node: fx.Node) -> Region:
    given = call_arguments(node)
    q, k, v, kv_of_head = given["q"], given["k"], given["v"], tuple(given["kv_of_head"])
    heads, groups = shape(q)[1], shape(k)[1]
    if kv_of_head != tuple(h * groups // heads for h in range(heads)):
        k, v = (_of_heads(node, t, kv_of_head) for t in (k, v))
        groups = heads
    lead, rows, columns = _frame(q, k)
    kv_lead = [lead[0], _groups(lead[1], groups, heads)]
    scores = (*lead, rows, columns)
    added = (given["bias"], given["mask"])
    return _region(
        node,
        (q, k, v),
        lead,
        kv_lead,
        rows,
        columns,
        given["scale"],
        steps=tuple(_masking(node, t, scores) for t in added if t is not None),
        softcap=given["softcap"],
        sinks=None if given["sinks"] is None else _broadcast(node, given["sinks"], (*lead, rows, ())),
        pattern=parse(given["pattern"]),
    )


def _frame(q: fx.Node, k: fx.Node) -> tuple[list[Axis], Axis, Axis]:
    """Leading axes, queries and keys of the scores."""
    *lead, rows, columns = fresh((*shape(q)[:-1], shape(k)[-2]))
    return lead, rows, columns


def _groups(heads: Axis, groups: int, count: int) -> Axis:
    """The axis of keys and values that neighbouring query heads share."""
    if groups == 1:
        return ()
    split = reshape((heads,), (groups, count // groups))
    assert split is not None
    return split[0]


def _of_heads(node: fx.Node, t: fx.Node, kv_of_head: Sequence[int]) -> fx.Node:
    """Keys or values of each query head."""
    emit = Emitter(node.graph, node)
    return emit.call(aten.cat.default, [emit.call(aten.slice.Tensor, t, 1, g, g + 1) for g in kv_of_head], 1)


def _masking(node: fx.Node, mask: fx.Node, scores: Axes) -> Step:
    operand = _broadcast(node, mask, scores)
    return Hide(operand, False, -math.inf) if dtype(mask) == torch.bool else Term(operand, 1.0)


def _broadcast(node: fx.Node, t: fx.Node, scores: Axes) -> Operand:
    axes = broadcast(t, resolve_all(scores))
    if axes is None:
        raise unreadable(node, "a mask that broadcasts to the scores")
    return Operand(t, axes)


def _region(
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    lead: Sequence[Axis],
    kv_lead: Sequence[Axis],
    rows: Axis,
    columns: Axis,
    scale: float,
    **others: Any,
) -> Region:
    q, k, v = operands
    (d,), (e,) = fresh((shape(q)[-1],)), fresh((shape(v)[-1],))
    of_q, of_k, of_v, of_out = (*lead, rows, d), (*kv_lead, columns, d), (*kv_lead, columns, e), (*lead, rows, e)
    return Region(
        q=Operand(q, of_q),
        k=Operand(k, of_k),
        v=Operand(v, of_v),
        out=Operand(node, of_out),
        scale=scale,
        batch=(),
        heads=(),
        queries=(),
        keys=columns,
        features=d,
        value_features=e,
        nodes=(node,),
        anchor=node,
        frames=((q, of_q), (k, of_k), (v, of_v), (node, of_out)),
        **others,
    )
