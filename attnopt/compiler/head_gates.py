"""A captured model with a gate on every head output: a number to set or to differentiate by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from attnopt.backends.reference import Reference
from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten
from attnopt.ir.operands import HIDES, Operands, operands_of
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.lower import copy_program, inline
from attnopt.match.find import Found


@dataclass(frozen=True)
class Gated:
    """``module`` equals the model while all gates are 1; ``gates`` [1, H, 1, 1] by site name.  A gate of 0 puts the
    replacement in the place of the head's output."""

    module: fx.GraphModule
    gates: Mapping[str, Tensor]


def gated(
    gm: fx.GraphModule, found: Sequence[Found], kind: str = "zero", means: Mapping[str, Tensor] | None = None
) -> Gated:
    """A copy of ``gm`` with shared weights and a gate after each head of these sites.

    ``kind`` of replacement, see ``HeadProbe.output``; ``means``: for "mean", of each site the mean output of each head [H, Dv].
    """
    module, table = copy_program(gm)
    gates: dict[str, Tensor] = {}
    for n, f in enumerate(found):
        raised = f.raised
        node, out = table[raised.node], table[raised.out]
        table[raised.region.out.node].replace_all_uses_with(out)
        emit = Emitter(module.graph, node, {"site": f.site.name})
        operands = operands_of(node)
        lowered = inline(emit, raised.spec, Reference(), operands)
        gate = nn.Parameter(torch.ones(1, raised.spec.num_heads, 1, 1, device=f.site.device))
        gates[f.site.name] = gate
        read = _stored(emit, module, f"gate_{n}", gate, node)
        dtype = lowered.meta["val"].dtype
        made = emit.call(aten.mul.Tensor, lowered, emit.call(aten._to_copy.default, read, dtype=dtype))
        other = _replacement(emit, kind, raised.spec, operands, lowered, None if means is None else means[f.site.name])
        if other is not None:
            closed = emit.call(aten._to_copy.default, emit.call(aten.rsub.Scalar, read, 1.0), dtype=dtype)
            made = emit.call(aten.add.Tensor, made, emit.call(aten.mul.Tensor, other, closed))
        node.replace_all_uses_with(made)
    remove_unused_nodes(module)
    return Gated(module, gates)


def _stored(emit: Emitter, module: fx.GraphModule, name: str, gate: nn.Parameter, node: fx.Node) -> fx.Node:
    module.register_parameter(name, gate)
    with module.graph.inserting_before(node):
        read = module.graph.get_attr(name)
    with emit.mode:
        read.meta["val"] = torch.empty(gate.shape, device=gate.device)
    return read


def _replacement(
    emit: Emitter, kind: str, spec: AttentionSpec, operands: Operands[fx.Node], lowered: fx.Node, mean_HD: Tensor | None
) -> fx.Node | None:
    """What takes the place of the heads' outputs, [B, H, L, Dv] or broadcast; None for zeros."""
    value: Tensor = lowered.meta["val"]
    if kind == "mean":
        assert mean_HD is not None
        return emit.constant(mean_HD.to(value.device, value.dtype).reshape(1, spec.num_heads, 1, -1))
    if kind == "resample":
        return emit.call(aten.roll.default, lowered, [1], [0])
    return _uniform(emit, spec, operands) if kind == "uniform" else None


def _uniform(emit: Emitter, spec: AttentionSpec, operands: Operands[fx.Node]) -> fx.Node:
    """The mean of the values of all visible keys: scores of 0, and of the bias only what it hides."""
    mask = operands.mask
    if operands.bias is not None:
        top = emit.call(aten.amax.default, operands.bias, [-1], True)
        seen = emit.call(aten.gt.Tensor, operands.bias, emit.call(aten.sub.Tensor, top, HIDES))
        mask = seen if mask is None else emit.call(aten.bitwise_and.Tensor, mask, seen)
    bare = replace(
        spec.bare, scale=0.0, softcap=None, zero_keys=None, weight_gains=None, has_bias=False, has_sinks=False,
        has_mask=mask is not None,
    )  # fmt: skip
    return inline(emit, bare, Reference(), Operands(operands.q, operands.k, operands.v, mask=mask))
