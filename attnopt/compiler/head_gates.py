"""A captured model with a gate on every head output: a number to set or to differentiate by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from attnopt.compiler.head_graph import head_graph
from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten
from attnopt.match.find import Found


@dataclass(frozen=True)
class Gated:
    """``module`` equals the model while all gates are 1; ``gates`` [1, H, 1, 1] by site name."""

    module: fx.GraphModule
    gates: Mapping[str, Tensor]


def gated(gm: fx.GraphModule, found: Sequence[Found]) -> Gated:
    """A copy of ``gm`` with shared weights and a gate after each head of these sites."""
    graph = head_graph(gm, found)
    module, gates = graph.module, dict[str, Tensor]()
    for n, f in enumerate(found):
        output = graph.outputs[f.site.name]
        emit = Emitter(module.graph, output.next, {"site": f.site.name})
        gate = nn.Parameter(torch.ones(1, f.raised.spec.num_heads, 1, 1, device=f.site.device))
        gates[f.site.name] = gate
        module.register_parameter(f"gate_{n}", gate)
        with module.graph.inserting_before(output.next):
            read = module.graph.get_attr(f"gate_{n}")
        with emit.mode:
            read.meta["val"] = torch.empty(gate.shape, device=gate.device)
        cast = emit.call(aten._to_copy.default, read, dtype=output.meta["val"].dtype)
        closed = emit.call(aten.mul.Tensor, output, cast)
        output.replace_all_uses_with(closed)
        closed.replace_input_with(closed, output)
    remove_unused_nodes(module)
    return Gated(module, gates)
