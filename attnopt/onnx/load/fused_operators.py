"""Operators that are a whole attention, or what stands beside one, in plain torch: those of ONNX Runtime (com.microsoft, as
its ContribOperators.md words them) and of ONNX 23 with a soft cap, a past or two masks.

A file is read with them to be compared.  To be rewritten, it is read without: what they hide has no names in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.onnx.load.layout_operators import Attributes
from attnopt.onnx.load.operators import rms_norm
from attnopt.onnx.load.values import Value, tensor

Fused = Callable[..., tuple[Value, ...]]  # (attributes, *inputs) -> the outputs, those at the end may be missing
_FILTER = -10000.0  # what ONNX Runtime adds where a mask hides, by default


def kind_of(domain: str, op_type: str) -> str:
    """The name in ``FUSED``."""
    return op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"


# ---------------------------------------------------------------- the core
def _core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    added: Tensor | None = None,
    seen: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, H, L, D], [B, G, S, D], [B, G, S, Dv] -> [B, H, L, Dv]"""
    k, v = _shared(k, q.shape[1]), _shared(v, q.shape[1])
    s = torch.matmul(q, k.transpose(-1, -2)) * scale
    if softcap:
        s = torch.tanh(s / softcap) * softcap
    if added is not None:
        s = s + added
    if seen is not None:
        s = s.masked_fill(torch.logical_not(seen), torch.finfo(s.dtype).min)
    if sinks is None:
        return torch.matmul(torch.softmax(s, -1), v)
    column = sinks.reshape(1, -1, 1, 1).expand(s.shape[0], s.shape[1], s.shape[2], 1)
    return torch.matmul(torch.softmax(torch.cat([s, column], -1), -1)[..., :-1], v)


def _shared(x_BGSD: Tensor, heads: int) -> Tensor:
    B, G, S, D = x_BGSD.shape
    return x_BGSD if heads == G else x_BGSD.unsqueeze(2).expand(B, G, heads // G, S, D).reshape(B, heads, S, D)


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, L, H * D] -> [B, H, L, D]"""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _joined(x_BHLD: Tensor) -> Tensor:
    return x_BHLD.transpose(1, 2).flatten(2)


def _causal(q: Tensor, k: Tensor, past: Any, window: int = -1) -> Tensor:
    """Bool [L, S]: query i, at position i + past, sees itself and earlier keys, ``window`` of them."""
    i = torch.arange(q.shape[2], device=q.device)[:, None] + past
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    return j <= i if window < 0 else torch.logical_and(j <= i, j > i - window)


def _appended(past: Value | None, x: Tensor) -> tuple[Tensor, Any]:
    """The past and ``x`` along the keys, and how long the past is."""
    if past is None or tensor(past).shape[2] == 0:
        return x, 0
    return torch.cat([tensor(past), x], 2), tensor(past).shape[2]


def _unless(value: object, what: str) -> None:
    if value:
        raise NotImplementedError(what)


# ---------------------------------------------------------------- attentions
def _attention(
    a: Attributes,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    past_k: Value | None = None,
    past_v: Value | None = None,
    lengths: Value | None = None,
) -> tuple[Value, ...]:
    """https://onnx.ai/onnx/operators/onnx__Attention.html"""
    _unless(lengths is not None, "lengths of the keys")
    operands = [tensor(x) for x in (q, k, v)]
    is_flat = operands[0].dim() == 3
    if is_flat:
        heads = (a["q_num_heads"], *[a["kv_num_heads"]] * 2)
        operands = [_split(x, n) for x, n in zip(operands, heads, strict=True)]
    own = operands[0]
    keys, past = _appended(past_k, operands[1])
    values, _ = _appended(past_v, operands[2])
    given = None if mask is None else tensor(mask)
    seen = _causal(own, keys, past) if a.get("is_causal") else None
    if given is not None and given.dtype == torch.bool:
        seen, given = given if seen is None else torch.logical_and(given, seen), None
    scale = a.get("scale") or 1 / math.sqrt(own.shape[-1])
    made = _core(own, keys, values, scale, added=given, seen=seen, softcap=a.get("softcap", 0.0))
    return (_joined(made) if is_flat else made), keys, values


def _multi_head_attention(
    a: Attributes,
    q: Value,
    k: Value | None = None,
    v: Value | None = None,
    bias: Value | None = None,
    padding: Value | None = None,
    added: Value | None = None,
    past_k: Value | None = None,
    past_v: Value | None = None,
    *others: Value | None,
) -> tuple[Value, ...]:
    """com.microsoft.MultiHeadAttention"""
    _unless(any(x is not None for x in others), "buffers of a cache")
    heads = a["num_heads"]
    query, key, value = _unpacked(tensor(q), k, v, heads)
    if bias is not None:
        widths = [x.shape[1] * x.shape[3] for x in (query, key, value)]
        parts = torch.split(tensor(bias), [int(n) for n in widths])
        query, key, value = (x + _split(b[None, None], heads) for x, b in zip((query, key, value), parts, strict=True))
    key, past = _appended(past_k, key)
    value, _ = _appended(past_v, value)
    seen = _causal(query, key, past) if a.get("unidirectional") else None
    extra = None if added is None else tensor(added)
    if padding is not None:
        hidden = _padding(tensor(padding), key, a.get("mask_filter_value", _FILTER))
        extra = hidden if extra is None else extra + hidden
    scale = a.get("scale") or 1 / math.sqrt(query.shape[-1])
    return _joined(_core(query, key, value, scale, added=extra, seen=seen)), key, value


def _unpacked(q: Tensor, k: Value | None, v: Value | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    if k is None:  # [B, L, H, 3, D]
        query, key, value = q.permute(3, 0, 2, 1, 4).unbind(0)
        return query, key, value
    key = tensor(k)
    if key.dim() == 5:  # [B, S, H, 2, D]
        first, second = key.permute(3, 0, 2, 1, 4).unbind(0)
        return _split(q, heads), first, second
    assert v is not None
    both = (x if x.dim() == 4 else _split(x, heads) for x in (key, tensor(v)))
    return _split(q, heads), *both  # type: ignore[return-value]


def _padding(mask: Tensor, k: Tensor, hides: float) -> Tensor:
    """A mask of keys [B, S], of pairs [B, L, S], or the lengths [B], as an addend of the scores."""
    if mask.dim() == 1:
        _unless(mask.shape[0] != k.shape[0], "positions of packed tokens")
        mask = torch.arange(k.shape[2], device=mask.device)[None, :] < mask[:, None]
    _unless(mask.dim() > 3, "a mask of this form")
    seen = mask.to(torch.bool)
    seen = seen[:, None, None, :] if mask.dim() == 2 else seen[:, None]
    return torch.where(seen, 0.0, hides).to(k.dtype)


def _packed_attention(
    a: Attributes,
    x: Value,
    weights: Value,
    bias: Value | None = None,
    mask: Value | None = None,
    past: Value | None = None,
    added: Value | None = None,
    *others: Value | None,
) -> tuple[Value, ...]:
    """com.microsoft.Attention: with the projections in it."""
    _unless(past is not None or a.get("do_rotary") or any(o is not None for o in others), "a past or positions")
    made = F.linear(tensor(x), tensor(weights).mT, None if bias is None else tensor(bias))
    widths = a.get("qkv_hidden_sizes") or [made.shape[-1] // 3] * 3
    query, key, value = (_split(part, a["num_heads"]) for part in torch.split(made, [int(n) for n in widths], -1))
    seen = _causal(query, key, 0) if a.get("unidirectional") else None
    extra = None if added is None else tensor(added)
    if mask is not None:
        hidden = _padding(tensor(mask), key, a.get("mask_filter_value", _FILTER))
        extra = hidden if extra is None else extra + hidden
    scale = a.get("scale") or 1 / math.sqrt(query.shape[-1])
    return (_joined(_core(query, key, value, scale, added=extra, seen=seen)),)


def _grouped(
    a: Attributes,
    q: Value,
    k: Value | None,
    v: Value | None,
    past_k: Value | None,
    past_v: Value | None,
    lengths: Value,
    total: Value,
    cos: Value | None = None,
    sin: Value | None = None,
    positions: Value | None = None,
    added: Value | None = None,
    sinks: Value | None = None,
    *others: Value | None,
) -> tuple[Value, ...]:
    """com.microsoft.GroupQueryAttention: always causal.  Tokens are those from the start of the sequence on."""
    _unless(a.get("smooth_softmax") or any(o is not None for o in others), "a smooth softmax or a quantized cache")
    heads, kv_heads = a["num_heads"], a["kv_num_heads"]
    if k is None or v is None:
        packed = _split(tensor(q), heads + 2 * kv_heads)
        query, key, value = torch.split(packed, [heads, kv_heads, kv_heads], 1)
    else:
        query, key, value = _split(tensor(q), heads), _split(tensor(k), kv_heads), _split(tensor(v), kv_heads)
    past = 0 if past_k is None else tensor(past_k).shape[2]
    if a.get("do_rotary"):
        assert cos is not None
        assert sin is not None
        at = None if positions is None else tensor(positions)
        at = torch.arange(query.shape[2], device=query.device)[None] + past if at is None else at
        turn = (tensor(cos)[at], tensor(sin)[at], bool(a.get("rotary_interleaved")))
        query, key = _rotated(query, *turn), _rotated(key, *turn)
    key, _ = _appended(past_k, key)
    value, _ = _appended(past_v, value)
    made = _core(
        query,
        key,
        value,
        a.get("scale") or 1 / math.sqrt(query.shape[-1]),
        added=None if added is None else tensor(added),
        seen=_causal(query, key, past, a.get("local_window_size", -1)),
        softcap=a.get("softcap", 0.0),
        sinks=None if sinks is None else tensor(sinks),
    )
    return _joined(made), key, value


# ---------------------------------------------------------------- positions
def _rotated(x_BHLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor, interleaved: bool) -> Tensor:
    """The first 2 R features of each head are turned."""
    cos, sin = cos_BLR.unsqueeze(1), sin_BLR.unsqueeze(1)
    size = 2 * cos.shape[-1]
    turned, rest = x_BHLD[..., :size], x_BHLD[..., size:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    first, second = a * cos - b * sin, b * cos + a * sin
    made = torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)
    return made if size == x_BHLD.shape[-1] else torch.cat([made, rest], -1)


def _rotary(a: Attributes, x: Tensor, cos_BLR: Tensor, sin_BLR: Tensor, head_size: int) -> tuple[Value, ...]:
    is_flat = x.dim() == 3
    heads = a.get("num_heads") or (x.shape[-1] // head_size if is_flat else 0)
    made = _rotated(_split(x, heads) if is_flat else x, cos_BLR, sin_BLR, bool(a.get("interleaved")))
    return (_joined(made) if is_flat else made,)


def _rotary_of_runtime(a: Attributes, x: Value, positions: Value, cos: Value, sin: Value) -> tuple[Value, ...]:
    """com.microsoft.RotaryEmbedding: positions [B, L], or the first one."""
    _unless(a.get("is_packed_batching") or a.get("scale", 1.0) != 1.0, "packed tokens or a scale")
    given, at = tensor(x), tensor(positions)
    length = given.shape[1] if given.dim() == 3 else given.shape[2]
    at = at if at.dim() == 2 else (at.reshape(1) + torch.arange(length, device=at.device))[None]
    size = a.get("rotary_embedding_dim") or 2 * tensor(cos).shape[-1]
    return _rotary(a, given, tensor(cos)[at], tensor(sin)[at], size)


def _rotary_of_onnx(
    a: Attributes, x: Value, cos: Value, sin: Value, positions: Value | None = None
) -> tuple[Value, ...]:
    """https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html"""
    turns = [tensor(t) if positions is None else tensor(t)[tensor(positions)] for t in (cos, sin)]
    return _rotary(a, tensor(x), turns[0], turns[1], 2 * tensor(cos).shape[-1])


# ---------------------------------------------------------------- beside attentions
def _rms_norm(a: Attributes, x: Value, weight: Value) -> tuple[Value, ...]:
    return (rms_norm(a, x, weight),)


def _skip_norm(
    a: Attributes, x: Value, skip: Value, weight: Value, shift: Value | None = None, bias: Value | None = None
) -> tuple[Value, ...]:
    total = tensor(x) + tensor(skip) + (0 if bias is None else tensor(bias))
    made = F.layer_norm(
        total,
        total.shape[-1:],
        tensor(weight),
        None if shift is None else tensor(shift),
        a.get("epsilon", 1e-12),
    )
    return made, total.new_zeros(()), total.new_zeros(()), total


def _skip_rms_norm(a: Attributes, x: Value, skip: Value, weight: Value, bias: Value | None = None) -> tuple[Value, ...]:
    total = tensor(x) + tensor(skip) + (0 if bias is None else tensor(bias))
    (made,) = _rms_norm(a, total, weight)
    return made, total.new_zeros(()), total.new_zeros(()), total


def _gelu(approximate: str) -> Fused:
    def run(_: Attributes, x: Value, bias: Value | None = None) -> tuple[Value, ...]:
        return (F.gelu(tensor(x) if bias is None else tensor(x) + tensor(bias), approximate=approximate),)

    return run


def _quick_gelu(a: Attributes, x: Value) -> tuple[Value, ...]:
    return (tensor(x) * torch.sigmoid(tensor(x) * a.get("alpha", 1.702)),)


def _fused_matmul(a: Attributes, x: Value, y: Value) -> tuple[Value, ...]:
    _unless(a.get("transBatchA") or a.get("transBatchB"), "batches that are transposed")
    left = tensor(x).transpose(-1, -2) if a.get("transA") else tensor(x)
    right = tensor(y).transpose(-1, -2) if a.get("transB") else tensor(y)
    return (torch.matmul(left, right) * a.get("alpha", 1.0),)


FUSED: dict[str, Fused] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary_of_onnx,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "com.microsoft.Attention": _packed_attention,
    "com.microsoft.MultiHeadAttention": _multi_head_attention,
    "com.microsoft.GroupQueryAttention": _grouped,
    "com.microsoft.RotaryEmbedding": _rotary_of_runtime,
    "com.microsoft.SkipLayerNormalization": _skip_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "com.microsoft.Gelu": _gelu("none"),
    "com.microsoft.BiasGelu": _gelu("none"),
    "com.microsoft.FastGelu": _gelu("tanh"),
    "com.microsoft.QuickGelu": _quick_gelu,
    "com.microsoft.FusedMatMul": _fused_matmul,
}
