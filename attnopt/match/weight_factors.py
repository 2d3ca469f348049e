"""Known factors on softmax weights, such as a soft causal mask (iLLaMA, arXiv:2404.06773): 1 on some pairs, r on all others."""

from __future__ import annotations

import torch
from torch import fx

from attnopt.graph.axes import Axes, broadcast
from attnopt.graph.evaluate import inputs_behind, is_plain
from attnopt.graph.nodes import arg, aten, is_call, is_tensor, shape
from attnopt.ir.weight_gains import Part, WeightGains
from attnopt.match.mask_numbers import Lengths
from attnopt.match.mask_patterns import name_pattern, samples
from attnopt.match.read_scores import Operand


def factor_of(node: fx.Node, weights: fx.Node, axes: Axes | None = None) -> Operand | None:
    """What ``node`` multiplies ``weights`` by, element by element, if it is the same at every call.  ``axes``: of the
    weights; without them only whether there is such a factor."""
    if not is_call(node, aten.mul.Tensor) or shape(node) != shape(weights):
        return None
    factor = arg(node, 1) if arg(node, 0) is weights else arg(node, 0)
    if not is_tensor(factor) or factor is weights or inputs_behind(factor) or not is_plain(factor):
        return None
    if axes is None:
        return Operand(factor, ())
    found = broadcast(factor, axes)
    return None if found is None else Operand(factor, found)


def gains_of(gm: fx.GraphModule, factor: fx.Node, lengths: Lengths, heads: int) -> WeightGains | None:
    """The gains that ``factor`` [1, 1, L, S] amounts to at every valid size of the graph; None unless it has two values, one
    of them on the pairs of a pattern."""
    seen = samples(gm, [factor], lengths, None)
    if seen is None:
        return None
    values = sorted({float(x) for sample in seen for x in torch.unique(sample.values[0])})
    if len(values) != 2 or values[0] < 0:
        return None
    low, high = values
    pattern = name_pattern([(sample, sample.values[0] == high) for sample in seen])
    if pattern is None:
        return None
    parts = ((pattern, high), (~pattern, low))
    return WeightGains(tuple(Part(p, (gain,) * heads) for p, gain in parts if gain != 1), "none")
