"""The operators in an optimized graph where no torch operator is as good: ``attnopt::attention``, which is
``AttentionSpec`` as a call, without edits and gains; and ``attnopt::attention_with_lse``, whose results over disjoint keys
can be merged.

``import attnopt`` registers them with torch; their implementation is chosen at run time and imported at the first call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("attnopt::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    pattern: str,
    kv_of_head: Sequence[int],
    scale: float,
    softcap: float | None,
    selected: Tensor | None = None,
    wanted: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """[B, H, L, D], [B, G, S, D], [B, G, S, Dv] -> [B, H, L, Dv] in v's dtype; the others as in ``Attend``.

    ``pattern`` is in the notation of ``attnopt.patterns.parse``.  ``selected`` as in ``Operands``.
    Rows outside ``wanted``, bool [B, H, L], are unused by the caller, and may be zeros.  The last three are those of
    ``SegmentTensors``.
    """
    from attnopt.backends import dispatch

    segments = dispatch.segments_of(q_segments, kv_segments, pairs)
    given = dispatch.call(q, k, v, bias, mask, sinks, pattern, kv_of_head, scale, softcap, selected, segments)
    return dispatch.forward(*given, wanted)


@torch.library.custom_op("attnopt::attention_with_lse", mutates_args=())
def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    pattern: str,
    kv_of_head: Sequence[int],
    scale: float,
    softcap: float | None,
    selected: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``attention``, with the log-sum-exp of each row in two parts, as in ``AttendWithLse``."""
    from attnopt.backends import dispatch

    segments = dispatch.segments_of(q_segments, kv_segments, pairs)
    given = dispatch.call(q, k, v, bias, mask, sinks, pattern, kv_of_head, scale, softcap, selected, segments)
    return dispatch.forward_with_lse(*given)


@attention.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    B, H, L, _D = q.shape
    return v.new_empty(B, L, H, v.shape[3]).transpose(1, 2)


@attention_with_lse.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    top, log_sum = (q.new_empty(q.shape[:3], dtype=wide) for _ in range(2))
    return _shape(q, k, v, *others), top, log_sum


def _keep(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    from attnopt.backends import dispatch

    dispatch.keep(ctx, inputs[:11], inputs[12:])  # the rows that are wanted stand between


def _keep_with_lse(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    from attnopt.backends import dispatch

    dispatch.keep(ctx, inputs[:11], inputs[11:])


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    from attnopt.backends import dispatch

    return (*dispatch.backward(ctx, grad), *[None] * 9)


def _backward_with_lse(ctx: object, grad: Tensor, _: Tensor, of_log_sum: Tensor) -> tuple[Tensor | None, ...]:
    from attnopt.backends import dispatch

    return (*dispatch.backward_with_lse(ctx, grad, of_log_sum), *[None] * 8)


attention.register_autograd(_backward, setup_context=_keep)
attention_with_lse.register_autograd(_backward_with_lse, setup_context=_keep_with_lse)

ATTENTION = torch.ops.attnopt.attention.default  # in a graph
ATTENTION_WITH_LSE = torch.ops.attnopt.attention_with_lse.default
