"""The attention of a spec, as nodes of a graph: the operators of a backend, or one call of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, fx, nn

from attnopt.backends.reference import Reference
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import value
from attnopt.ir.call_tensor import CallTensor
from attnopt.ir.constant import Constant, Weight
from attnopt.ir.extended_keys import MoreKeys
from attnopt.ir.interfaces import Backend
from attnopt.ir.operands import Operands
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.other_tokens import MoreNodes, input_of


def inline(
    emit: Emitter,
    spec: AttentionSpec,
    backend: Backend,
    operands: Operands[fx.Node],
    more: MoreNodes | None = None,
    pools: Sequence[tuple[fx.Node, fx.Node]] = (),
) -> fx.Node:
    """The attention as the operators of a backend.  ``pools``: as ``ready`` of ``attnopt.ir.pooling.pooled``."""
    call, inputs = _call(emit, spec, backend, operands, more, pools)
    return emit.inline(call, *inputs)


def as_specified(
    emit: Emitter, spec: AttentionSpec, operands: Operands[fx.Node], more: MoreNodes | None = None
) -> fx.Node:
    """The attention as one call of its reference: what verifies operators is not traced into operators itself."""
    call, inputs = _call(emit, spec, Reference(), operands, more)
    q, v = value(operands.q), value(operands.v)
    with emit.mode:
        like = v.new_empty((q.shape[0], spec.num_heads, q.shape[2], v.shape[3]))
    return emit.run(call, *inputs, like=like)


def _call(
    emit: Emitter,
    spec: AttentionSpec,
    backend: Backend,
    operands: Operands[fx.Node],
    more: MoreNodes | None,
    pools: Sequence[tuple[fx.Node, fx.Node]] = (),
) -> tuple[Callable[..., Tensor], list[fx.Node]]:
    """The attention as a function, and the nodes that it is to be called with."""
    given = operands.given
    device = value(operands.q).device
    others = () if more is None else more.given
    read = [input_of(emit, t) if isinstance(t, CallTensor) else emit.constant(_held(t, device)) for t in spec.tensors]

    def call(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        of_role = {role: next(rest) for role in given}
        t = operands.map(lambda role, _: of_role[role])
        beside = [next(rest) for _ in others]
        ready = [(next(rest), next(rest)) for _ in pools]
        attend = attention_of(backend, spec, list(rest), MoreKeys(*beside) if beside else None, ready)
        return attend(t.q, t.k, t.v, **t.others)

    return call, [*given.values(), *others, *chain(*pools), *read]


def _held(constant: Constant, device: torch.device) -> Tensor:
    held = constant.tensor(device)
    return nn.Parameter(held) if isinstance(constant, Weight) else held
