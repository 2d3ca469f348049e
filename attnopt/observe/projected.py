"""What the query projection of an attention reads, as tokens [B, L, C]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from attnopt.errors import CalibrationError
from attnopt.graph.interpreter import Interpreter
from attnopt.graph.nodes import calls, is_tensor
from attnopt.graph.ops import Kind, of
from attnopt.match.find import Found
from attnopt.slicing.selection import is_weight, weight_behind

_CONVOLUTIONS = of(Kind.CONVOLUTION)
_PROJECTS = _CONVOLUTIONS | of(Kind.PRODUCT)


def input_of(owner: str, f: Found) -> fx.Node:
    """The node that the query projection reads.  Raises CalibrationError if no projection is known."""
    weight = f.site.projections["q"].weight
    for n in f.dirty["q"]:
        weights = [weight_behind(i) for i in n.all_input_nodes if is_weight(i)]
        if calls(n, _PROJECTS) and any(w is not None and str(w.target) == weight for w in weights):
            read = [i for i in n.all_input_nodes if is_tensor(i) and not is_weight(i)]
            if len(read) == 1:
                return read[0]
    why = f.site.projections["q"].why or "no single tensor is projected to queries"
    raise CalibrationError(
        f"{owner}: it has no known input: {why}",
        site=f.site.name,
        hint='leave it out with sites=..., or ask for "q"',
    )


def tokens(gm: fx.GraphModule, f: Found, node: fx.Node, values: dict[fx.Node, Any], q: Tensor) -> Tensor:
    """The value of ``node`` as [B, L, C], for the queries ``q`` [B, H, L, D].  Raises CalibrationError."""
    B, _, L, _ = q.shape
    x: Tensor = values[node]
    if any(calls(u, _CONVOLUTIONS) for u in node.users if u in f.dirty["q"]):
        x = x.flatten(2).transpose(1, 2)
    if x.dim() == 4 and x.shape[0] == B and x.shape[1] * x.shape[2] == L:
        x = x.flatten(1, 2)
    if x.dim() == 2:
        if len(x) == B * L:
            x = x.reshape(B, L, -1) if _is_token_next(gm, f, node, values, q) else x.reshape(L, B, -1).transpose(0, 1)
    elif x.dim() == 3 and x.shape[:2] == (L, B) and not (B == L and _is_token_next(gm, f, node, values, q)):
        x = x.transpose(0, 1)
    if x.dim() != 3 or x.shape[:2] != (B, L):
        raise CalibrationError(
            f"its input has the sizes {tuple(values[node].shape)}, which are not those of {B} x {L} tokens",
            site=f.site.name,
            hint='leave it out with sites=..., or ask for "q"',
        )
    return x


def _is_token_next(gm: fx.GraphModule, f: Found, node: fx.Node, values: dict[fx.Node, Any], q: Tensor) -> bool:
    """By evaluation: the neighbour of the first token in memory is the second token of the first sequence."""
    if q.shape[0] == 1 or q.shape[2] == 1:
        return True
    x = values[node].clone()
    (x if x.dim() == 2 else x.flatten(0, 1))[1] = torch.nan
    after = {node, *_below(node, f)}
    known = {n: v for n, v in values.items() if n not in after} | {node: x}
    reached: Tensor = Interpreter(gm, known)(f.raised.operands.q)
    return bool(reached[0, :, 1].isnan().any())


def _below(node: fx.Node, f: Found) -> set[fx.Node]:
    """What is computed from ``node`` on the way to the queries."""
    reached = {node}
    for n in node.graph.nodes:
        if reached & set(n.all_input_nodes):
            reached.add(n)
        if n is f.raised.operands.q:
            break
    return reached - {node}
