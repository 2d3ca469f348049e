"""Writes an attention in its chosen form into an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import onnx_ir as ir
import torch

from attnopt.ir.operands import Operands
from attnopt.onnx.export.block_loop import blocks, gathered, is_one
from attnopt.onnx.export.builder import Builder, before_swap
from attnopt.onnx.export.choose_form import WITH_ATTENTION, Form, OnnxSite, group_form, groups
from attnopt.onnx.export.fused_ops import attention, group_query_attention, multi_head_attention
from attnopt.onnx.export.sent_loop import senders
from attnopt.onnx.export.values import Values

X = TypeVar("X", bound=Operands[ir.Value])
_ELEMENT = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
_FLAT_ONLY = ("MultiHeadAttention", "GroupQueryAttention")


def write(b: Builder, site: OnnxSite, form: Form, operands: Operands[ir.Value]) -> ir.Value:
    """[B, H, L, Dv] of the attention, computed in float32 or wider."""
    site, operands = evenly_shared(b, site, operands)
    q, k, v, bias, sinks = operands.q, operands.k, operands.v, operands.bias, operands.sinks
    is_dense = form.kind in ("per head", "senders") or (form.kind == "Attention" and b.opset < WITH_ATTENTION)
    is_flat = form.kind in _FLAT_ONLY or (not is_dense and all(before_swap(x) is not None for x in (k, v)))
    narrow = _ELEMENT.get(site.dtype)
    q, k, v = (flat(b, x) if is_flat else x for x in (q, k, v))
    if narrow is not None:
        q, k, v = (b.op("Cast", x, to=ir.DataType.FLOAT) for x in (q, k, v))
        bias, sinks = (None if x is None else _keeping_shape(b, x) for x in (bias, sinks))
    made = _made(b, site, form, Values(q, k, v, bias, operands.mask, sinks, is_flat))
    if narrow is not None:
        made = b.op("Cast", made, to=narrow)
    if not is_flat:
        return made
    return b.op("Transpose", b.op("Reshape", made, b.ints(0, 0, site.spec.num_heads, -1)), perm=[0, 2, 1, 3])


def _made(b: Builder, site: OnnxSite, form: Form, x: Values) -> ir.Value:
    match form.kind:
        case "MultiHeadAttention":
            return multi_head_attention(b, site, x)
        case "GroupQueryAttention":
            return group_query_attention(b, site, x)
        case "blocks":
            return blocks(b, site, x, form.block)
        case "gathered":
            return gathered(b, site, x, form.block)
        case "senders":
            return senders(b, site, x, form.block)
        case "per head":
            return _per_head(b, site, x)
    return attention(b, site, x)


def _per_head(b: Builder, site: OnnxSite, x: Values) -> ir.Value:
    """Heads with one pattern together, then all heads back in their order."""
    made: list[ir.Value] = []
    order: list[int] = []
    for alone in groups(site):
        form = group_form(alone)
        assert form is not None
        heads, kv_heads = alone.spec.heads, alone.spec.kv_heads
        part = replace(
            x,
            q=heads_of(b, x.q, heads),
            k=heads_of(b, x.k, kv_heads),
            v=heads_of(b, x.v, kv_heads),
            bias=_heads_of_operand(b, x.bias, heads),
            mask=_heads_of_operand(b, x.mask, heads),
            sinks=_heads_of_operand(b, x.sinks, heads),
        )
        alone, part = evenly_shared(b, alone, part)
        made.append(_made(b, alone, form, part))
        order += heads
    joined = b.op("Concat", *made, axis=1)
    return heads_of(b, joined, [order.index(h) for h in range(site.spec.num_heads)])


def evenly_shared(b: Builder, site: OnnxSite, x: X) -> tuple[OnnxSite, X]:
    """The same attention with keys and values repeated for each query head, if ONNX could not share them as they are."""
    if site.spec.is_evenly_shared:
        return site, x
    shared = site.spec.kv_of_head
    return site.unshared(), replace(x, k=heads_of(b, x.k, shared), v=heads_of(b, x.v, shared))


def heads_of(b: Builder, x: ir.Value, heads: Sequence[int]) -> ir.Value:
    """Some heads of [B, H, ...]."""
    return b.op("Gather", x, b.ints(*heads), axis=1)


def _heads_of_operand(b: Builder, x: ir.Value | None, heads: Sequence[int]) -> ir.Value | None:
    if x is None or is_one(x, 1):
        return x
    taken = heads_of(b, x, heads)
    assert x.shape is not None
    taken.shape, taken.type = ir.Shape([x.shape[0], len(heads), x.shape[2], x.shape[3]]), x.type
    return taken


def _keeping_shape(b: Builder, x: ir.Value) -> ir.Value:
    """The operand in float32; its broadcast axes are still unknown."""
    cast = b.op("Cast", x, to=ir.DataType.FLOAT)
    cast.shape, cast.type = x.shape, ir.TensorType(ir.DataType.FLOAT)
    return cast


def flat(b: Builder, x: ir.Value) -> ir.Value:
    """[B, H, L, D] as [B, L, H * D]."""
    return b.op("Reshape", b.swapped(x), b.ints(0, 0, -1))
