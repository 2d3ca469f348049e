"""Bounds that scores are clamped to."""

from __future__ import annotations

import math

import torch
from torch import fx

from attnopt.graph.nodes import arg, calls, dtype
from attnopt.graph.ops import named
from attnopt.match.overwrites import number

Bounds = tuple[float | None, float | None]  # the least and the largest value; None: there is none

_BOTH, _LEAST, _LARGEST = named("clamp"), named("clamp_min maximum max.other"), named("clamp_max minimum min.other")
CLAMPS = _BOTH | _LEAST | _LARGEST


def bounds_of(node: fx.Node, source: fx.Node) -> Bounds | None:
    """What ``node``, one of ``CLAMPS``, clamps ``source`` to, without bounds that no number of its dtype is beyond; None if they
    are not known."""
    if node.kwargs or not dtype(node).is_floating_point:
        return None
    other = arg(node, 1) if arg(node, 0) is source else arg(node, 0)
    given = (
        (arg(node, 1), arg(node, 2)) if calls(node, _BOTH) else (other, None) if calls(node, _LEAST) else (None, other)
    )
    most, found = torch.finfo(dtype(node)).max, list[float | None]()
    for x, sign in zip(given, (-1, 1), strict=True):
        bound = None if x is None else number(x)
        if x is not None and (bound is None or math.isnan(bound)):
            return None
        found.append(None if bound is None or sign * bound >= most else bound)
    low, high = found
    if any(x is not None and math.isinf(x) for x in found):
        return None
    return (high, high) if low is not None and high is not None and low > high else (low, high)


def scaled(bounds: Bounds, factor: float) -> Bounds:
    """Those of ``factor`` times the scores."""
    low, high = (None if x is None else x * factor for x in bounds)
    return (low, high) if factor >= 0 else (high, low)


def joined(first: Bounds, second: Bounds) -> Bounds:
    """Those of scores that are clamped twice."""
    low, high = _wide(second)
    both = [min(max(x, low), high) for x in _wide(first)]
    return None if math.isinf(both[0]) else both[0], None if math.isinf(both[1]) else both[1]


def _wide(bounds: Bounds) -> tuple[float, float]:
    low, high = bounds
    return -math.inf if low is None else low, math.inf if high is None else high
