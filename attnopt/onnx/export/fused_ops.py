"""One fused operator for some queries and their keys: the building block of every form of attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export import plain_operators
from attnopt.onnx.export.builder import ORT, Attribute, Builder
from attnopt.onnx.export.choose_form import WITH_ATTENTION, OnnxSite
from attnopt.onnx.export.values import Values

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def attention(b: Builder, site: OnnxSite, x: Values, is_full: bool = False) -> ir.Value:
    """ai.onnx Attention on these operands; ``is_full``: the last two axes of bias or mask are already L and S.

    In older opsets, the same in plain operators.
    """
    if b.opset < WITH_ATTENTION:
        return plain_operators.attention(b, site, x)
    q, k, v, mask = x.q, x.k, x.v, _one_mask(b, site, x.bias, x.mask)
    if mask is not None and not is_full:
        lengths = b.op("Concat", b.size(x.q, x.axis), b.size(x.k, x.axis), axis=0)
        mask = b.op("Expand", mask, lengths)
    if x.sinks is not None:
        mask = _with_column(b, site, x, mask)
        k, v = _with_blank_key(b, k, x.axis), _with_blank_key(b, v, x.axis)
    scale = site.spec.scale
    if (
        not scale > 0 or site.dtype == torch.float64
    ):  # the operator rejects the former, and rounds the latter to float32
        q, scale = b.op("Mul", q, b.constant(np.asarray(scale, _float(site)))), 1.0
    heads, kv_heads = (site.spec.num_heads, site.spec.num_kv_heads) if x.is_flat else (None, None)
    return b.op(
        "Attention", q, k, v, mask, scale=scale, softcap=site.spec.softcap, q_num_heads=heads, kv_num_heads=kv_heads
    )


def multi_head_attention(b: Builder, site: OnnxSite, x: Values) -> ir.Value:
    """All keys for all queries, flat operands."""
    return b.op("MultiHeadAttention", x.q, x.k, x.v, domain=ORT, num_heads=site.spec.num_heads, scale=site.spec.scale)


def group_query_attention(b: Builder, site: OnnxSite, x: Values) -> ir.Value:
    """The causal triangle of a square, flat operands."""
    if site.is_static:  # a constant: ONNX Runtime's shape inference fails on a computed one
        length = b.constant(np.asarray([site.q_len], np.int32))
        total = b.constant(np.asarray(site.q_len, np.int32))
    else:
        length = b.op("Cast", b.size(x.q, 1), to=ir.DataType.INT32)
        total = b.op("Squeeze", length)
    last = b.op("Expand", b.op("Sub", length, b.constant(np.asarray([1], np.int32))), b.size(x.q, 0))
    return group_query(b, site.spec, x.q, x.k, x.v, None, None, last, total)


def group_query(
    b: Builder, spec: AttentionSpec, *inputs: ir.Value | None, window: int | None = None, **attributes: Attribute
) -> ir.Value:
    """``window``: how many keys a query sees, its own included.  ``attributes``: further ones, of its cache."""
    return b.op(
        "GroupQueryAttention",
        *inputs,
        domain=ORT,
        outputs=3,
        num_heads=spec.num_heads,
        kv_num_heads=spec.num_kv_heads,
        scale=spec.scale,
        softcap=spec.softcap,
        local_window_size=window,
        **attributes,
    )


def _one_mask(b: Builder, site: OnnxSite, bias: ir.Value | None, visible: ir.Value | None) -> ir.Value | None:
    if bias is None or visible is None:
        return visible if bias is None else bias
    return b.op("Where", visible, bias, b.constant(np.asarray(-np.inf, _float(site))))


def _with_column(b: Builder, site: OnnxSite, x: Values, mask: ir.Value | None) -> ir.Value:
    """The mask as a bias [B, H, L, S + 1] whose last column is the sinks'."""
    assert x.sinks is not None
    lead = b.op("Concat", b.size(x.q, 0), b.ints(site.spec.num_heads), b.size(x.q, x.axis), axis=0)
    shape = b.op("Concat", lead, b.size(x.k, x.axis), axis=0)
    zero = b.constant(np.asarray(0.0, _float(site)))
    if mask is None:
        mask = zero
    elif x.bias is None:
        mask = b.op("Where", mask, zero, b.constant(np.asarray(-np.inf, _float(site))))
    column = b.op("Expand", x.sinks, b.op("Concat", lead, b.ints(1), axis=0))
    return b.op("Concat", b.op("Expand", mask, shape), column, axis=3)


def _with_blank_key(b: Builder, x: ir.Value, axis: int) -> ir.Value:
    """One more token, of zeros."""
    dims = [b.ints(1) if i == axis else b.op("Shape", x, start=i, end=i + 1) for i in range(3 if axis == 1 else 4)]
    zero = b.op("CastLike", b.constant(np.asarray(0.0, np.float32)), x)
    return b.op("Concat", x, b.op("Expand", zero, b.op("Concat", *dims, axis=0)), axis=axis)


def _float(site: OnnxSite) -> type[np.float32] | type[np.float64]:
    return np.float64 if site.dtype == torch.float64 else np.float32
