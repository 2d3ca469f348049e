"""``attnopt::attention``: the operator in an optimized graph where no torch operator is as good.

It is ``AttentionSpec`` as a call, without edits.  ``import attnopt`` registers it with torch; its implementation is
chosen at run time and imported at the first call.
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
) -> Tensor:
    """[B, H, L, D], [B, G, S, D], [B, G, S, Dv] -> [B, H, L, Dv] in v's dtype; the others as in ``Attend``.

    ``pattern`` is in the notation of ``attnopt.patterns.parse``.  ``selected`` as in ``Operands``.
    Rows outside ``wanted``, bool [B, H, L], are unused by the caller, and may be zeros.
    """
    from attnopt.backends import attention_op

    return attention_op.forward(q, k, v, bias, mask, sinks, pattern, kv_of_head, scale, softcap, selected, wanted)


@attention.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    B, H, L, _D = q.shape
    return v.new_empty(B, L, H, v.shape[3]).transpose(1, 2)


def _keep(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    from attnopt.backends import attention_op

    attention_op.keep(ctx, inputs)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    from attnopt.backends import attention_op

    return attention_op.backward(ctx, grad)


attention.register_autograd(_backward, setup_context=_keep)

ATTENTION = torch.ops.attnopt.attention.default  # in a graph
