"""The first tokens of a text beside a window that rolls: a small cache of their own, merged by the log-sum-exp of its scores.

GroupQueryAttention gives no log-sum-exp, but with ``smooth_softmax`` it counts one more key, of score 0 and without a value.
With the log-sum-exp s of the sinks subtracted from all scores, that key has the sinks' share.  A feature more does both: 1 in
keys and values, and -s / scale in queries.  The output then has the window's share w in that feature, and

    o = o_window + (1 - w) * o_sinks

is the attention over both.  Where the window still reaches all sinks, the score of the query's own key is s, and o_window / w
the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.builder import Builder

LARGEST = 127  # of a symmetric int8
_ZERO, _ONE = np.asarray(0.0, np.float32), np.asarray(1.0, np.float32)


@dataclass(frozen=True)
class SinkPart:
    """What queries get of the sinks: ``out`` [B, H, L, D], ``shift`` [B, H, L, 1], the s above, and ``there`` [B, 1, L, 1],
    whether they see a sink that the window does not reach."""

    out: ir.Value
    shift: ir.Value
    there: ir.Value

    def widened(
        self, b: Builder, spec: AttentionSpec, width: int, q: ir.Value, k: ir.Value, v: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """With ``width`` features more."""
        less = b.op("Mul", self.shift, b.constant(np.asarray(-1 / spec.scale, np.float32)))
        k, v = (_padded(b, _padded(b, x, 1, _ONE), width - 1, _ZERO) for x in (k, v))
        return _padded(b, b.op("Concat", q, less, axis=3), width - 1, _ZERO), k, v

    def joined(self, b: Builder, spec: AttentionSpec, made: ir.Value) -> ir.Value:
        """The attention over sinks and window, of what the operator ``made`` [B, H, L, D + width]."""
        D = spec.head_dim
        o, w = b.slice(made, b.ints(0), b.ints(D), 3), b.slice(made, b.ints(D), b.ints(D + 1), 3)
        both = b.op("Add", o, b.op("Mul", b.op("Sub", b.constant(_ONE), w), self.out))
        return b.op("Where", self.there, both, b.op("Div", o, w))


def first_position(b: Builder, last: ir.Value, new: ir.Value) -> ir.Value:
    """[B, 1] of the tokens of this call, ``new`` [B, G, L, D], that end with those at ``last`` [B]."""
    end = b.op("Unsqueeze", b.op("Cast", last, to=ir.DataType.INT64), b.ints(1))
    return b.op("Add", b.op("Sub", end, b.size(new, 2)), b.ints(1))


def kept_sinks(b: Builder, past: ir.Value, new: ir.Value, first: ir.Value, count: int) -> ir.Value:
    """The keys or values of the first ``count`` tokens [B, G, count, D]: ``new`` brings those from position ``first`` on."""
    at = b.op("Sub", b.constant(np.arange(count)[None]), first)
    zero, length = b.number(0), b.op("Squeeze", b.size(new, 2))
    inside = b.op("And", b.op("GreaterOrEqual", at, zero), b.op("Less", at, length))
    clipped = b.op("Clip", at, zero, b.op("Sub", length, b.number(1)))
    index = b.op("Expand", b.op("Unsqueeze", clipped, b.ints(1, 3)), b.op("Shape", past))
    taken = b.op("GatherElements", new, index, axis=2)
    return b.op("Where", b.op("Unsqueeze", inside, b.ints(1, 3)), taken, past)


def sink_part(
    b: Builder, spec: AttentionSpec, window: int, q: ir.Value, k: ir.Value, kept: tuple[ir.Value, ir.Value],
    first: ir.Value, count: int,
) -> SinkPart:  # fmt: skip
    """``kept``: keys and values of the first ``count`` tokens.  ``window``: keys that a query sees besides, its own included."""
    H, G, D, scale = spec.num_heads, spec.num_kv_heads, spec.head_dim, np.asarray(spec.scale, np.float32)
    places = b.op("Add", first, b.arange(b.ints(0), b.size(q, 2)))  # [B, L]
    beyond = b.op("Unsqueeze", b.op("Sub", places, b.number(window)), b.ints(1, 3))  # the last token outside the window
    there = b.op("GreaterOrEqual", beyond, b.number(0))
    seen = b.op("LessOrEqual", b.constant(np.arange(count)), beyond)

    by_group = b.op("Reshape", q, b.ints(0, G, -1, D))
    scores = b.op("MatMul", by_group, b.op("Transpose", kept[0], perm=[0, 1, 3, 2]))
    scores = b.op("Mul", b.op("Reshape", scores, b.ints(0, H, -1, count)), b.constant(scale))
    hidden = b.op("Where", seen, scores, b.constant(np.asarray(-np.inf, np.float32)))
    of_heads = b.op("Reshape", q, b.ints(0, G, H // G, -1, D))
    own = b.op("ReduceSum", b.op("Mul", of_heads, b.op("Unsqueeze", k, b.ints(2))), b.ints(4), keepdims=0)
    own = b.op("Mul", b.op("Reshape", own, b.ints(0, H, -1, 1)), b.constant(scale))

    top = b.op("Where", there, b.op("ReduceMax", hidden, b.ints(3)), own)
    weights = b.op("Exp", b.op("Sub", hidden, top))
    total = b.op("Where", there, b.op("ReduceSum", weights, b.ints(3)), b.constant(_ONE))
    shares = b.op("Reshape", b.op("Div", weights, total), b.ints(0, G, -1, count))
    out = b.op("Reshape", b.op("MatMul", shares, kept[1]), b.ints(0, H, -1, D))
    return SinkPart(out, b.op("Add", top, b.op("Log", total)), there)


def widened_scales(scales: Tensor, width: int) -> Tensor:
    """[G, D + width] of int8 keys or values [G, D] with ``width`` features more, the first of which is 1."""
    more = torch.ones(len(scales), width)
    more[:, :1] = 1 / LARGEST
    return torch.cat([scales, more], 1)


def _padded(b: Builder, x: ir.Value, count: int, value: np.ndarray) -> ir.Value:
    """``count`` features more, of this value."""
    return b.op("Pad", x, b.ints(0, 0, 0, 0, 0, 0, 0, count), b.constant(value))
