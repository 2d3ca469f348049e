"""A captured model with its attentions in canonical form, so that the outputs of heads are nodes of its graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from attnopt.backends.sdpa import Sdpa
from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.copies import copy_program
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, shape, value
from attnopt.ir import plugin_calls
from attnopt.ir.operands import Operands, operands_of
from attnopt.ir.semantics import heads_of
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.spec_calls import as_specified, inline
from attnopt.match.find import Found

FUSED = Sdpa()
Inputs = Mapping[str, Collection[int]]  # "q", "k" or "v" -> places of query heads


@dataclass(frozen=True)
class HeadGraph:
    """``module`` equals the model.  ``outputs``: those of its heads, [B, H, L, Dv], by site, as they run.
    ``operands``: what these are computed from.

    ``inputs``: by site and role, what chosen query heads read, [B, H, L or S, D]; with another value of such a node these heads
    read that, and all others what the model computes.
    """

    module: fx.GraphModule
    outputs: Mapping[str, fx.Node]
    operands: Mapping[str, Operands[fx.Node]]
    inputs: Mapping[str, Mapping[str, fx.Node]] = field(default_factory=dict)


def head_graph(gm: fx.GraphModule, found: Sequence[Found], inputs: Mapping[str, Inputs] | None = None) -> HeadGraph:
    """A copy of ``gm`` with shared weights, in which these sites are computed by fused attention, or else by the reference.

    ``inputs``: of which heads the inputs can be replaced, by site."""
    module, table = copy_program(gm)
    outputs, read = dict[str, fx.Node](), dict[str, Operands[fx.Node]]()
    replaceable: dict[str, Mapping[str, fx.Node]] = {}
    for f in found:
        raised = f.raised
        node, out = table[raised.node], table[raised.out]
        table[raised.region.out.node].replace_all_uses_with(out)
        emit = Emitter(module.graph, node, {"site": f.site.name})
        spec, operands, nodes = raised.spec, operands_of(node), dict[str, fx.Node]()
        if inputs is not None and (wanted := inputs.get(f.site.name)):
            spec, operands, nodes = _with_inputs(emit, spec, operands, wanted)
        is_fused = plugin_calls.accepts(FUSED, replace(f.site, spec=spec)) is None
        computed = inline(emit, spec, FUSED, operands) if is_fused else as_specified(emit, spec, operands)
        outputs[f.site.name], read[f.site.name] = computed, operands
        replaceable[f.site.name] = nodes
        node.replace_all_uses_with(outputs[f.site.name])
    remove_unused_nodes(module)
    place = {n: i for i, n in enumerate(module.graph.nodes)}
    ordered = sorted(outputs, key=lambda name: place[outputs[name]])
    return HeadGraph(module, {name: outputs[name] for name in ordered}, read, replaceable)


def _with_inputs(
    emit: Emitter, spec: AttentionSpec, operands: Operands[fx.Node], wanted: Inputs
) -> tuple[AttentionSpec, Operands[fx.Node], dict[str, fx.Node]]:
    """The attention with one K/V head for each query head, where some of them may be replaced."""
    made, nodes = {"q": operands.q, "k": operands.k, "v": operands.v}, dict[str, fx.Node]()
    if {"k", "v"} & wanted.keys():
        before = spec
        made["k"], made["v"] = (emit.inline(lambda x: heads_of(before, x), made[role]) for role in ("k", "v"))
        each = tuple(range(spec.num_heads))
        spec = replace(spec, kv_heads=tuple(spec.kv_heads[g] for g in spec.kv_of_head), kv_of_head=each)
    for role, places in wanted.items():
        own = made[role]
        nodes[role] = emit.call(aten.clone.default, own)
        chosen = torch.tensor([h in places for h in range(shape(own)[1])], device=value(own).device)
        made[role] = emit.call(aten.where.self, emit.constant(chosen.reshape(1, -1, 1, 1)), nodes[role], own)
    return spec, replace(operands, **made), nodes
