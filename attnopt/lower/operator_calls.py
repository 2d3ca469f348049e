"""Calls of attnopt's own operators in a graph: what they compute, and the same in operators of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, fx

from attnopt.backends import block_gather
from attnopt.backends.attention_operator import ATTENTION, ATTENTION_WITH_LSE
from attnopt.backends.reference import Reference
from attnopt.backends.sdpa import Sdpa
from attnopt.base.sizes import is_static
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, is_call, shape, value
from attnopt.graph.sdpa import call_arguments
from attnopt.ir.operands import ROLES, Operands, OperandTensors, SegmentTensors, selected_pairs
from attnopt.ir.reference import reference_with_lse
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import parse
from attnopt.patterns.algebra import Pattern

Function = Callable[[Operands[Tensor]], Tensor]


def of_operator(emit: Emitter, call: fx.Node) -> tuple[Operands[fx.Node], AttentionSpec]:
    """Of a call of one of attnopt's own operators, a selection of blocks and segments as parts of the mask."""
    given = call_arguments(call)
    operands: Operands[fx.Node] = Operands.of([given[role] for role in ROLES])
    if (selected := given["selected"]) is not None:
        q, k, mask = operands.q, operands.k, operands.mask
        kept = emit.inline(lambda s, q, k: selected_pairs(s, q.shape[2], k.shape[2]), selected, q, k)
        operands = replace(operands, mask=hidden_by_both(emit, kept, mask))
    if given.get("q_segments") is not None:
        ids = [n for name in ("q_segments", "kv_segments", "pairs") if (n := given[name]) is not None]
        kept = emit.inline(lambda *ids: SegmentTensors(*ids).mask(), *ids)
        operands = replace(operands, mask=hidden_by_both(emit, kept, operands.mask))
    shared = tuple(given["kv_of_head"])
    return operands, called_spec(operands, shared, given["scale"], parse(given["pattern"]), given["softcap"])


def called_spec(
    operands: Operands[fx.Node],
    kv_of_head: tuple[int, ...],
    scale: float,
    pattern: Pattern,
    softcap: float | None = None,
) -> AttentionSpec:
    """What a call with these operands computes."""
    q, k, v = (shape(n) for n in (operands.q, operands.k, operands.v))
    return AttentionSpec.of(
        q[1], k[1], q[3], v[3], scale=scale, kv_of_head=kv_of_head, pattern=pattern, softcap=softcap
    ).having(operands.bias, operands.mask, operands.sinks)


def hidden_by_both(emit: Emitter, a: fx.Node, b: fx.Node | None) -> fx.Node:
    """The pairs that both masks show."""
    return a if b is None else emit.call(aten.bitwise_and.Tensor, a, b)


def write_out_lse(graph: fx.Graph) -> None:
    """Replace every call of ``attnopt::attention_with_lse`` by what it computes, over all pairs under a mask."""
    for call in list(graph.nodes):
        if not is_call(call, ATTENTION_WITH_LSE):
            continue
        emit = Emitter(graph, call)
        operands, spec = of_operator(emit, call)
        for item in list(call.users):
            index = item.args[1]
            assert isinstance(index, int)
            item.replace_all_uses_with(_inlined(emit, operands, _part(spec, index)))
            graph.erase_node(item)
        graph.erase_node(call)


def write_out(graph: fx.Graph) -> int:
    """Replace every call of attnopt's own operators by operators of torch; how many compute more pairs than before.

    Blocks that a pattern hides are left out where both lengths are fixed.
    """
    write_out_lse(graph)
    dense = 0
    for call in list(graph.nodes):
        if not is_call(call, ATTENTION):
            continue
        emit = Emitter(graph, call)
        operands, spec = of_operator(emit, call)
        in_blocks = all(is_static(value(x).shape[2]) for x in (operands.q, operands.k))
        dense += not in_blocks
        call.replace_all_uses_with(_inlined(emit, operands, _blocks(spec) if in_blocks else _dense(spec)))
        graph.erase_node(call)
    return dense


def _part(spec: AttentionSpec, index: int) -> Function:
    """The output (index 0) or a part of the log-sum-exp (1, 2)."""
    attend = reference_with_lse(spec)
    return lambda t: attend(t.q, t.k, t.v, bias=t.bias, mask=t.mask, sinks=t.sinks)[index]


def _dense(spec: AttentionSpec) -> Function:
    backend = Sdpa() if Sdpa().check(spec) is None else Reference()
    attend = backend.lower(spec)
    return lambda t: attend(t.q, t.k, t.v, bias=t.bias, mask=t.mask, sinks=t.sinks)


def _blocks(spec: AttentionSpec) -> Function:
    return lambda t: block_gather.attend(spec, OperandTensors(t.q, t.k, t.v, t.bias, t.mask, t.sinks))


def _inlined(emit: Emitter, operands: Operands[fx.Node], compute: Function) -> fx.Node:
    roles = tuple(operands.given)

    def of_tensors(*tensors: Tensor) -> Tensor:
        return compute(Operands(**dict(zip(roles, tensors, strict=True))))

    return emit.inline(of_tensors, *operands.given.values())
