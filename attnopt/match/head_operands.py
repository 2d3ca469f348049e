"""Linear maps across heads as operands of the canonical attention, and biases that they map."""

from __future__ import annotations

import math

from torch import fx

from attnopt.graph.axes import resolve
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, shape
from attnopt.match.head_maps import HeadMap
from attnopt.match.region import Region
from attnopt.match.rejection import rejected


def matrix_of(emit: Emitter, r: Region, made: HeadMap) -> fx.Node:
    """[1, to, from, 1].  Raises NotAttentionError if it is another axis that is mapped."""
    if resolve(made.axis) != r.heads or r.between_channels:
        expected = "a linear map of scores or weights across all heads"
        raise rejected(made.weight, "mapped-axis", expected, "a map along another axis")
    weight, heads = made.weight, math.prod(a.size for a in r.heads)
    if made.transposed:
        weight = emit.call(aten.permute.default, weight, [1, 0])
    return emit.call(aten.reshape.default, weight, [1, heads, heads, 1])


def mapped(emit: Emitter, r: Region, made: HeadMap, bias: fx.Node) -> fx.Node:
    """The map of a bias [B|1, H|1, L|1, S|1], which each head then has its own of."""
    matrix = matrix_of(emit, r, made)
    heads = shape(matrix)[1]
    if shape(bias)[1] != heads:
        bias = emit.call(aten.expand.default, bias, [-1, heads, -1, -1])
    square = emit.call(aten.reshape.default, matrix, [heads, heads])
    return emit.call(aten.einsum.default, "hj,bjls->bhls", [square, bias])
