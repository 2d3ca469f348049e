"""The implementation of ``attnopt::attention``, chosen at run time: the compiled kernel on a CPU, FlexAttention on a
GPU, otherwise torch operators block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt.backends import block_gather, flex, native, row_gather
from attnopt.backends.by_segment import side_by_side
from attnopt.base.user_warning import warn
from attnopt.ir.operands import ROLES, OperandTensors, SegmentTensors
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import parse
from attnopt.patterns.registry import PATTERNS


def call(
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
    segments: SegmentTensors | None = None,
) -> tuple[AttentionSpec, OperandTensors]:
    """What the arguments of an operator of ``attnopt.backends.attention_operator`` mean.  Raises ValueError."""
    if segments is not None:
        _check_lengths(segments, q, k)
    sizes = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    spec = _spec(*sizes, pattern, tuple(kv_of_head), scale, softcap, PATTERNS.changes)
    return spec, OperandTensors(q, k, v, bias, mask, sinks, selected, segments)


def segments_of(queries: Tensor | None, keys: Tensor | None, pairs: Tensor | None) -> SegmentTensors | None:
    return None if queries is None or keys is None else SegmentTensors(queries, keys, pairs)


def _check_lengths(segments: SegmentTensors, q: Tensor, k: Tensor) -> None:
    for what, ids, x in (("queries", segments.queries, q), ("keys", segments.keys, k)):
        if ids.shape[0] not in (1, x.shape[0]) or ids.shape[1] != x.shape[2]:
            wanted = f"[{x.shape[0]} or 1, {x.shape[2]}]"
            raise ValueError(f"the segments of the {what} are {list(ids.shape)}, expected {wanted}")


def forward(spec: AttentionSpec, operands: OperandTensors, wanted: Tensor | None) -> Tensor:
    if wanted is not None and operands.q.device.type == "cpu":
        return row_gather.attend(spec, operands.with_segments_masked(), wanted, _all_rows)
    return _all_rows(spec, operands)


def forward_with_lse(spec: AttentionSpec, operands: OperandTensors) -> tuple[Tensor, Tensor, Tensor]:
    found = _by_kernel(spec, operands)
    if found is None:
        found = _in_torch(operands.q).attend_with_lse(spec, operands.with_segments_masked())
    o, top, log_sum = found
    return _heads_inside(o), top.contiguous(), log_sum.contiguous()


def _all_rows(spec: AttentionSpec, operands: OperandTensors) -> Tensor:
    found = _by_kernel(spec, operands)
    if found is not None:
        return found[0]
    return _heads_inside(_in_torch(operands.q).attend(spec, operands.with_segments_masked()))


def _by_kernel(spec: AttentionSpec, operands: OperandTensors) -> tuple[Tensor, Tensor, Tensor] | None:
    if operands.q.device.type != "cpu" or operands.q.dtype == torch.float64:
        return None
    try:
        return native.attend(*side_by_side(spec, operands))
    except native.NoKernelError as e:
        _warn(str(e))
        return None


def _heads_inside(o: Tensor) -> Tensor:
    """With the strides of [B, L, H, Dv]."""
    return o.transpose(1, 2).contiguous().transpose(1, 2)


@lru_cache(maxsize=256)
def _spec(
    H: int,
    G: int,
    D: int,
    Dv: int,
    pattern: str,
    kv_of_head: tuple[int, ...],
    scale: float,
    softcap: float | None,
    changes: int,
) -> AttentionSpec:
    """``changes`` of the pattern registry: the same text may then mean another class."""
    return AttentionSpec.of(H, G, D, Dv, scale=scale, kv_of_head=kv_of_head, pattern=parse(pattern), softcap=softcap)


def _in_torch(q: Tensor) -> ModuleType:
    """The implementation where the kernel does not apply: differentiable, and for any device."""
    return flex if q.device.type == "cuda" and q.dtype != torch.float64 else block_gather


@lru_cache
def _warn(reason: str) -> None:
    """Once for each reason."""
    warn(f"attention runs without its compiled kernel: {reason}")


def keep(ctx: Any, inputs: tuple[Any, ...], ids: tuple[Any, ...]) -> None:
    """What the backward pass needs: up to ``selected``, and segments.  Rows that are not wanted get no gradient."""
    ctx.spec, t = call(*inputs)
    ctx.save_for_backward(t.q, t.k, t.v, t.bias, t.mask, t.sinks, t.selected, *ids)


def backward(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Of the operands.  Recomputes the blocks with differentiable operators, like memory-efficient attention."""
    return _gradients(ctx, lambda spec, t: (_in_torch(t.q).attend(spec, t),), (grad,))


def backward_with_lse(ctx: Any, grad: Tensor, of_log_sum: Tensor) -> list[Tensor | None]:
    """The largest score is a constant beside the sum relative to it."""

    def compute(spec: AttentionSpec, t: OperandTensors) -> tuple[Tensor, ...]:
        o, _, log_sum = _in_torch(t.q).attend_with_lse(spec, t)
        return o, log_sum

    return _gradients(ctx, compute, (grad, of_log_sum))


def _gradients(
    ctx: Any, compute: Callable[[AttentionSpec, OperandTensors], tuple[Tensor, ...]], grads: tuple[Tensor, ...]
) -> list[Tensor | None]:
    names = (*ROLES, "selected")
    *saved, q_segments, kv_segments, pairs = ctx.saved_tensors
    segments = segments_of(q_segments, kv_segments, pairs)
    given = {name: t for name, t in zip(names, saved, strict=True) if t is not None}
    wanted = [name for name, needed in zip(names, ctx.needs_input_grad, strict=False) if needed and name in given]
    with torch.enable_grad():
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in given.items()}
        nothing = leaves["v"].sum() * 0  # no query may see any key
        operands = OperandTensors(**leaves, segments=segments).with_segments_masked()
        made = [x if x.requires_grad else x + nothing for x in compute(ctx.spec, operands)]
        of_leaves = [leaves[name] for name in wanted]
        found = torch.autograd.grad(made, of_leaves, grads, allow_unused=True, materialize_grads=True)
    of_names = dict(zip(wanted, found, strict=True))
    return [of_names.get(name) for name in ROLES]
