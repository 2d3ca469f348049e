"""An attention that is already one operator: torch's ``scaled_dot_product_attention``."""

from __future__ import annotations

import math

import torch
from torch import fx

from attnopt.graph.axes import Axes, broadcast, fresh, reshape, resolve_all
from attnopt.graph.nodes import dtype, shape
from attnopt.graph.sdpa import sdpa_arguments
from attnopt.match.read_scores import Hide, Operand, Step, Term
from attnopt.match.region import Region
from attnopt.match.rejection import rejected, unreadable


def from_fused(node: fx.Node) -> Region:
    given = sdpa_arguments(node)
    q, k, v, mask = given.query, given.key, given.value, given.attn_mask
    if given.dropout_p:
        found = f"dropout of {given.dropout_p}"
        raise rejected(node, "active-dropout", "no active dropout", found, "call model.eval() first")
    if given.scale is None:
        raise unreadable(node, "a scale that is a number")
    sq, sk, sv = shape(q), shape(k), shape(v)
    ndim = len(sq)
    frame = fresh((*sq[:-1], sk[-2]))
    lead, rows, columns = list(frame[:-2]), frame[-2], frame[-1]
    (d,), (e,) = fresh((sq[-1],)), fresh((sv[-1],))
    kv_lead = [ax if s != 1 else () for s, ax in zip(sk[:-2], lead[ndim - len(sk) :], strict=True)]
    if given.enable_gqa and sk[-3] != sq[-3]:
        group = reshape((lead[-1],), (sk[-3], sq[-3] // sk[-3]))
        assert group is not None
        kv_lead[-1] = group[0]
    if len(sk) != len(sv) or sk[:-2] != sv[:-2] or len(sk) > ndim:
        raise unreadable(node, "keys and values with the same leading axes")
    scores: Axes = (*resolve_all(tuple(lead)), rows, columns)
    steps: tuple[Step, ...] = ()
    if mask is not None:
        axes = broadcast(mask, scores)
        if axes is None:
            raise unreadable(node, "a mask that broadcasts to the scores")
        operand = Operand(mask, axes)
        steps = (Hide(operand, False, -math.inf) if dtype(mask) == torch.bool else Term(operand, 1.0),)
    q_axes, k_axes, v_axes = (*lead, rows, d), (*kv_lead, columns, d), (*kv_lead, columns, e)
    out_axes = (*lead, rows, e)
    return Region(
        q=Operand(q, q_axes),
        k=Operand(k, k_axes),
        v=Operand(v, v_axes),
        out=Operand(node, out_axes),
        scale=given.scale,
        batch=(),
        heads=(),
        queries=(),
        keys=columns,
        features=d,
        value_features=e,
        steps=steps,
        top_left_causal=given.is_causal,
        nodes=(node,),
        anchor=node,
        frames=((q, q_axes), (k, k_axes), (v, v_axes), (node, out_axes)),
    )
