"""A softmax over queries, one block of keys at a time: no map of all pairs exists.

Each key divides 1 among all queries, so the softmax of some keys is whole without the others, and what queries receive adds up.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from attnopt.onnx.export.block_loop import is_one
from attnopt.onnx.export.builder import Builder
from attnopt.onnx.export.choose_form import OnnxSite
from attnopt.onnx.export.values import Values


def senders(b: Builder, site: OnnxSite, x: Values, block: int) -> ir.Value:
    """[B, H, L, Dv], from queries, keys and values [B, H, L, D]."""
    kind = np.float64 if site.dtype == torch.float64 else np.float32
    element = ir.DataType.from_numpy(np.dtype(kind))
    k = b.op("Mul", x.k, b.constant(np.asarray(site.spec.scale, kind)))
    q_BHDL = b.op("Transpose", x.q, perm=[0, 1, 3, 2])
    keys = b.size(x.k, 2)
    turns = b.op("Div", b.op("Add", keys, b.ints(block - 1)), b.ints(block))
    sizes = b.op("Concat", b.op("Shape", x.q, start=0, end=3), b.size(x.v, 3), axis=0)
    nothing = b.op("Expand", b.constant(np.asarray(0.0, kind)), sizes)

    body = b.body()
    turn, going, so_far = (ir.Value(name=body.name(role)) for role in ("turn", "going", "so_far"))
    turn.type, turn.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
    going.type, going.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    so_far.type = ir.TensorType(element)
    start = body.op("Unsqueeze", body.op("Mul", turn, b.number(block)), b.ints(0))
    stop = body.op("Add", start, b.ints(block))  # a slice ends with its axis
    weights = _weights(body, site, x, q_BHDL, body.slice(k, start, stop, 2), (start, stop))
    given = body.op("MatMul", body.op("Transpose", weights, perm=[0, 1, 3, 2]), body.slice(x.v, start, stop, 2))
    made = body.op("Add", so_far, given)
    made.type = so_far.type
    goes_on = body.op("Identity", going)
    goes_on.type, goes_on.shape = going.type, going.shape
    inner = ir.Graph([turn, going, so_far], [goes_on, made], nodes=body.nodes, name=body.prefix)
    return b.op("Loop", b.op("Squeeze", turns), b.constant(np.asarray(True)), nothing, body=inner)


def _weights(
    b: Builder, site: OnnxSite, x: Values, q_BHDL: ir.Value, k: ir.Value, keys: tuple[ir.Value, ir.Value]
) -> ir.Value:
    """[B, H, keys, L] of these keys; zeros for one that no query sees."""
    kind = np.float64 if site.dtype == torch.float64 else np.float32
    scores = b.op("MatMul", k, q_BHDL)
    if site.spec.softcap is not None:
        cap = b.constant(np.asarray(site.spec.softcap, kind))
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    if x.bias is not None:
        scores = b.op("Add", scores, _of_keys(b, x.bias, keys))
    if x.mask is not None:
        mask = _of_keys(b, x.mask, keys)
        scores = b.op("Where", mask, scores, b.constant(np.asarray(-np.inf, kind)))
    weights = b.op("Softmax", scores, axis=3)
    if x.bias is None and x.mask is None:
        return weights
    return b.op("Where", b.op("IsNaN", weights), b.constant(np.asarray(0.0, kind)), weights)


def _of_keys(b: Builder, pairs: ir.Value, keys: tuple[ir.Value, ir.Value]) -> ir.Value:
    """The columns of these keys of a bias or mask, as rows."""
    found = pairs if is_one(pairs, 3) else b.slice(pairs, *keys, 3)
    return b.op("Transpose", found, perm=[0, 1, 3, 2])
