"""Numbers that are written over a tensor where a condition holds: ``masked_fill``, ``where``, and products with flags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.axes import unfollow
from attnopt.graph import CASTS, RESHAPES, arg, aten, constant_of, dtype, is_call, is_tensor, shape
from attnopt.probing import evaluate, inputs_behind, is_plain, other_sizes, symbols

WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
MASKED_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_COPIES = (
    *CASTS,
    *RESHAPES,
    aten.expand.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.detach.default,
)  # as many numbers as before, or one of them again and again


@dataclass(frozen=True)
class Overwrite:
    """A tensor becomes ``fill`` wherever ``condition`` is ``when``; of a condition that is no bool, 0 counts as False."""

    condition: fx.Node
    when: bool
    fill: float


def overwrite_of(node: fx.Node, source: fx.Node) -> Overwrite | None:
    """What ``node`` writes over ``source``; None if that is not known, or if it does something else."""
    if is_call(node, *MASKED_FILL):
        condition, fill, when = arg(node, 1), number(arg(node, 2)), True
        kept = arg(node, 0)
    elif is_call(node, *WHERE):
        when = arg(node, 1) is not source
        condition, fill = arg(node, 0), number(arg(node, 1 if when else 2))
        kept = arg(node, 2 if when else 1)
    else:
        return None
    if kept is not source or fill is None or not is_tensor(condition) or dtype(condition) != torch.bool:
        return None
    return Overwrite(condition, when, fill)


def zeros_of(node: fx.Node, source: fx.Node) -> Overwrite | None:
    """Where ``node`` puts zeros into ``source``, whose numbers it keeps elsewhere."""
    if is_call(node, aten.mul.Tensor):
        flags = arg(node, 1) if arg(node, 0) is source else arg(node, 0)
        return Overwrite(flags, False, 0.0) if is_tensor(flags) and _are_flags(flags) else None
    found = overwrite_of(node, source)
    return found if found is not None and found.fill == 0 else None


def _are_flags(node: fx.Node) -> bool:
    """0 and 1 alone: made of a bool tensor by casts and layout changes, or of numbers that are the same at every call."""
    while dtype(node) != torch.bool:
        above = None if is_call(node, aten.mul.Tensor, aten.div.Tensor) else unfollow(node, ((),) * len(shape(node)))
        if above is None:
            return not inputs_behind(node) and is_plain(node) and _holds_flags(node)
        node = above[0]
    return True


def _holds_flags(node: fx.Node) -> bool:
    gm = node.graph.owning_module
    assert gm is not None
    try:
        found = [evaluate(gm, node, sizes) for sizes in other_sizes(symbols(gm.graph))]
    except RuntimeError:  # a size that the graph does not take
        return False
    return all(bool(((x == 0) | (x == 1)).all()) for x in found)


def number(x: Any) -> float | None:
    """A constant number: a literal, or a tensor of one element made from a literal in the graph."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    while is_call(x, *_COPIES):
        x = arg(x, 0)
    if is_call(x, aten.full.default, aten.full_like.default, aten.new_full.default):
        made = arg(x, 2) if is_call(x, aten.new_full.default) else arg(x, 1)
        return float(made) if isinstance(made, (int, float)) else None
    if is_call(x, aten.scalar_tensor.default):
        return float(arg(x, 0))
    if is_call(x, aten.zeros.default, aten.zeros_like.default):
        return 0.0
    return _stored_number(x)


def _stored_number(x: Any) -> float | None:
    """The value of a one-element constant that capture lifted out of the graph."""
    if not isinstance(x, fx.Node) or x.op != "get_attr" or not is_tensor(x) or math.prod(shape(x)) != 1:
        return None
    found = constant_of(x)
    return None if found is None else float(found)
