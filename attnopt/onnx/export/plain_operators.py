"""An attention in operators that every opset has, for files from before ONNX's own Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from attnopt.onnx.export.builder import Builder
from attnopt.onnx.export.choose_form import OnnxSite

if TYPE_CHECKING:
    from attnopt.onnx.export.values import Values


def attention(b: Builder, site: OnnxSite, x: Values) -> ir.Value:
    """[B, H, L, Dv], or [B, L, H * Dv] for flat operands; zeros for a fully masked query."""
    kind = np.float64 if site.dtype == torch.float64 else np.float32
    spec = site.spec
    q = _heads(b, x, x.q, spec.num_heads)
    k = _heads(b, x, x.k, spec.num_kv_heads)
    v = _heads(b, x, x.v, spec.num_kv_heads)
    if spec.num_kv_heads != spec.num_heads:
        k, v = (b.op("Gather", t, b.ints(*spec.kv_of_head), axis=1) for t in (k, v))
    scores = b.op(
        "MatMul", b.op("Mul", q, b.constant(np.asarray(spec.scale, kind))), b.op("Transpose", k, perm=[0, 1, 3, 2])
    )
    if spec.softcap is not None:
        cap = b.constant(np.asarray(spec.softcap, kind))
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    if x.bias is not None:
        scores = b.op("Add", scores, x.bias)
    if x.mask is not None:
        scores = b.op("Where", x.mask, scores, b.constant(np.asarray(-np.inf, kind)))
    weights = _softmax(b, scores, x.sinks)
    if x.mask is not None:
        weights = b.op("Where", x.mask, weights, b.constant(np.asarray(0.0, kind)))
    elif x.bias is not None:
        weights = b.op("Where", b.op("IsNaN", weights), b.constant(np.asarray(0.0, kind)), weights)
    made = b.op("MatMul", weights, v)
    return b.op("Reshape", b.op("Transpose", made, perm=[0, 2, 1, 3]), b.ints(0, 0, -1)) if x.is_flat else made


def _softmax(b: Builder, scores: ir.Value, sinks: ir.Value | None) -> ir.Value:
    if sinks is None:
        return b.op("Softmax", scores, axis=3)
    lengths = [b.op("Shape", scores, start=i, end=i + 1) for i in range(3)]
    column = b.op("Expand", sinks, b.op("Concat", *lengths, b.ints(1), axis=0))
    joined = b.op("Softmax", b.op("Concat", scores, column, axis=3), axis=3)
    return b.op("Slice", joined, b.ints(0), b.op("Shape", scores, start=3, end=4), b.ints(3))


def _heads(b: Builder, x: Values, operand: ir.Value, heads: int) -> ir.Value:
    """[B, H, L, D]."""
    if not x.is_flat:
        return operand
    return b.op("Transpose", b.op("Reshape", operand, b.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3])
