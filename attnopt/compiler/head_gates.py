"""A captured model whose heads can be ablated: beside the output of each head is what replaces it, and a gate chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from attnopt.compiler.head_graph import HeadGraph, head_graph
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, value
from attnopt.ir.operands import HIDING, Operands
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.spec_calls import as_specified
from attnopt.match.find import Found


@dataclass(frozen=True)
class Gated:
    """``graph``: its module equals the model while all gates are 1, and its outputs are those behind the gates.

    ``replacements`` by site: what takes the place of the outputs of ablated heads, [B, H, L, Dv] or broadcast.
    ``gates`` by site: parameters [1, H, 1, 1], of which 0 ablates a head; none if the graph was made without.
    """

    graph: HeadGraph
    replacements: Mapping[str, fx.Node]
    gates: Mapping[str, fx.Node]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The gates, to differentiate by."""
        return {site: self.graph.module.get_parameter(str(gate.target)) for site, gate in self.gates.items()}

    def closed(self, heads: Mapping[str, Sequence[int]]) -> dict[fx.Node, Tensor]:
        """The values of the gates of one call, 0 at these places."""
        values: dict[fx.Node, Tensor] = {}
        for site, places in heads.items():
            gate = self.gates[site]
            values[gate] = torch.ones_like(self.graph.module.get_parameter(str(gate.target)), requires_grad=False)
            values[gate][0, list(places)] = 0.0
        return values


def gated(
    gm: fx.GraphModule,
    found: Sequence[Found],
    kind: str = "zero",
    means: Mapping[str, Tensor] | None = None,
    has_gates: bool = True,
) -> Gated:
    """A copy of ``gm`` with shared weights, in which heads of these sites have a replacement.

    ``kind``: see ``HeadProbe.output``; ``means``: for "mean", of each site the mean output of each head [H, Dv].
    """
    graph, sites = head_graph(gm, found), {f.site.name: f for f in found}
    outputs, replacements, gates = dict(graph.outputs), dict[str, fx.Node](), dict[str, fx.Node]()
    for name, output in graph.outputs.items():
        emit, read_by = Emitter(graph.module.graph, output.next, {"site": name}), list(output.users)
        mean = None if means is None else means[name]
        replacements[name] = _replacement(emit, kind, sites[name].raised.spec, graph.operands[name], output, mean)
        if has_gates:
            gates[name], outputs[name] = _gate(emit, f"gate_{len(gates)}", output, replacements[name])
            for user in read_by:
                user.replace_input_with(output, outputs[name])
    graph.module.recompile()
    return Gated(replace(graph, outputs=outputs), replacements, gates)


def _gate(emit: Emitter, name: str, output: fx.Node, other: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The gate, and ``gate * output + (1 - gate) * other``."""
    module, like = emit.graph.owning_module, value(output)
    assert module is not None
    gate = nn.Parameter(torch.ones(1, like.shape[1], 1, 1, device=like.device))
    module.register_parameter(name, gate)
    with emit.graph.inserting_before(emit.before):
        read = emit.graph.get_attr(name)
    with emit.mode:
        read.meta["val"] = torch.empty(gate.shape, device=gate.device)
    opened = emit.call(aten._to_copy.default, read, dtype=like.dtype)
    closed = emit.call(aten._to_copy.default, emit.call(aten.rsub.Scalar, read, 1.0), dtype=like.dtype)
    own, theirs = emit.call(aten.mul.Tensor, output, opened), emit.call(aten.mul.Tensor, other, closed)
    return read, emit.call(aten.add.Tensor, own, theirs)


def _replacement(
    emit: Emitter, kind: str, spec: AttentionSpec, operands: Operands[fx.Node], output: fx.Node, mean_HD: Tensor | None
) -> fx.Node:
    if kind == "resample":
        return emit.call(aten.roll.default, output, [1], [0])
    if kind == "uniform":
        return _uniform(emit, spec, operands)
    like = value(output)
    fixed = torch.zeros(spec.num_heads, 1) if mean_HD is None else mean_HD
    return emit.constant(fixed.to(like.device, like.dtype).reshape(1, spec.num_heads, 1, -1))


def _uniform(emit: Emitter, spec: AttentionSpec, operands: Operands[fx.Node]) -> fx.Node:
    """The mean of the values of all visible keys: scores of 0, and of the bias only what it hides."""
    mask = operands.mask
    if operands.bias is not None:
        top = emit.call(aten.amax.default, operands.bias, [-1], True)
        seen = emit.call(aten.gt.Tensor, operands.bias, emit.call(aten.add.Scalar, top, HIDING))
        mask = seen if mask is None else emit.call(aten.bitwise_and.Tensor, mask, seen)
    bare = replace(
        spec.bare, scale=0.0, softcap=None, clamp=None, linear=None, sends=False, zero_keys=None, weight_gains=None,
        has_bias=False, has_sinks=False, has_score_map=False, has_weight_map=False, has_mask=mask is not None,
    )  # fmt: skip
    return as_specified(emit, bare, Operands(operands.q, operands.k, operands.v, mask=mask))
