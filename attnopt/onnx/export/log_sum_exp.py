"""Attentions whose log-sum-exp is read, in plain operators: ONNX has no attention that returns it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, fx

from attnopt.backends.attention_operator import ATTENTION_WITH_LSE
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import is_call
from attnopt.ir.operands import Operands
from attnopt.ir.reference import reference_with_lse
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.canonical import of_operator


def write_out_lse(graph: fx.Graph) -> None:
    """Replace every call of ``attnopt::attention_with_lse`` by what it computes, over all pairs under a mask."""
    for call in list(graph.nodes):
        if not is_call(call, ATTENTION_WITH_LSE):
            continue
        emit = Emitter(graph, call)
        operands, spec = of_operator(emit, call)
        attend, given = _by_position(spec, tuple(operands.given)), operands.given.values()
        for item in list(call.users):
            index = item.args[1]
            assert isinstance(index, int)
            item.replace_all_uses_with(emit.inline(partial(attend, index), *given))
            graph.erase_node(item)
        graph.erase_node(call)


def _by_position(spec: AttentionSpec, roles: tuple[str, ...]) -> Callable[..., Tensor]:
    """The output (index 0) or a part of the log-sum-exp (1, 2) as a function of the operands in the order of ``roles``."""
    attend = reference_with_lse(spec)

    def result(index: int, *tensors: Tensor) -> Tensor:
        t = Operands(**dict(zip(roles, tensors, strict=True)))
        return attend(t.q, t.k, t.v, bias=t.bias, mask=t.mask, sinks=t.sinks)[index]

    return result
