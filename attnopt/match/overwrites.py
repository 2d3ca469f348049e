"""Conditional overwrites with a number: ``masked_fill``, ``where``, and multiplicative masks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Target

from attnopt.graph.axes import unfollow
from attnopt.graph.constants import filling
from attnopt.graph.evaluate import inputs_behind, is_plain
from attnopt.graph.nodes import arg, aten, calls, constant_of, dtype, is_call, is_tensor, shape
from attnopt.graph.ops import FACTORS, REARRANGED, Kind, named, of, rules
from attnopt.match.mask_patterns import samples

WHERE = named("where")
MASKED_FILL = named("masked_fill")
_ARITHMETIC: dict[Target, Callable[..., float]] = rules(
    {
        "add.Tensor": operator.add,
        "sub.Tensor": operator.sub,
        "mul.Tensor": operator.mul,
        "neg": operator.neg,
    }
)
_REPEATED = REARRANGED | of(Kind.CAST, Kind.EXPAND)  # the same numbers, or one of them again and again
_FILLED = of(Kind.FILL) | named("full")


@dataclass(frozen=True)
class Overwrite:
    """A tensor becomes ``fill`` wherever ``condition`` is ``when``; in a non-bool condition, 0 counts as False."""

    condition: fx.Node
    when: bool
    fill: float


def overwrite_of(node: fx.Node, source: fx.Node) -> Overwrite | None:
    """What ``node`` writes over ``source``; None if that is not known, or if it does something else."""
    if calls(node, MASKED_FILL):
        condition, fill, when = arg(node, 1), number(arg(node, 2)), True
        kept = arg(node, 0)
    elif calls(node, WHERE):
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
    """Only 0 and 1: a bool tensor after casts and layout changes, or numbers that are the same at every call."""
    while dtype(node) != torch.bool:
        above = None if calls(node, FACTORS) else unfollow(node, ((),) * len(shape(node)))
        if above is None:
            return _holds_flags(node)
        node = above[0]
    return True


def _holds_flags(node: fx.Node) -> bool:
    found = _known_values(node)
    return found is not None and all(bool(((x == 0) | (x == 1)).all()) for x in found)


def _known_values(node: fx.Node) -> list[Tensor] | None:
    """The values of ``node`` at several sizes, if they are the same at every call."""
    if node.op == "get_attr":
        stored = constant_of(node)
        return None if stored is None else [stored]
    if inputs_behind(node) or not is_plain(node):
        return None
    gm = node.graph.owning_module
    assert gm is not None
    seen = samples(gm, [node])
    return None if seen is None else [s.values[0] for s in seen]


def number(x: Any) -> float | None:
    """A constant number: a literal, a one-element tensor from known numbers only, or a filled tensor."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    while calls(x, _REPEATED):
        x = arg(x, 0)
    if calls(x, _FILLED):
        made = filling(x)
        return None if made is None else float(made)
    if is_call(x, aten.scalar_tensor.default):
        return float(arg(x, 0))
    if is_call(x, aten.zeros.default):
        return 0.0
    if isinstance(x, fx.Node) and x.target in _ARITHMETIC and not x.kwargs and math.prod(shape(x)) != 1:
        numbers = [number(a) for a in x.args]
        return None if None in numbers else float(_ARITHMETIC[x.target](*numbers))
    return _known_number(x)


def padding_of(node: fx.Node) -> float | None:
    """What a tensor is padded with, if it is a number."""
    if is_call(node, aten.constant_pad_nd.default):
        return number(arg(node, 2, 0))
    return number(arg(node, 3) or 0) if arg(node, 2, "constant") == "constant" else None


def _known_number(x: object) -> float | None:
    """The value of a one-element tensor, stored or computed from known values, at all sizes."""
    if not isinstance(x, fx.Node) or not is_tensor(x) or math.prod(shape(x)) != 1:
        return None
    found = _known_values(x)
    values = {float(v) for v in found or () if v.numel() == 1}
    return values.pop() if found is not None and len(values) == 1 else None
