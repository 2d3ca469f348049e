"""A captured model in which each head has two forms, as it is and edited, and a switch between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from attnopt.compiler.job import backends_of
from attnopt.graph.cleanup import remove_unused_nodes, share_equal_nodes
from attnopt.graph.copies import copy_program
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten
from attnopt.graph.store import store
from attnopt.ir.interfaces import Backend
from attnopt.ir.operands import operands_of
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.choose_backend import choose
from attnopt.lower.spec_calls import inline
from attnopt.match.find import Found


@dataclass(frozen=True)
class Switched:
    """``module`` equals the model while all switches are off; ``switches``: bool [1, H, 1, 1] by site, True for edited heads."""

    module: fx.GraphModule
    switches: Mapping[str, Tensor]

    def turn(self, heads: Mapping[str, Collection[int]]) -> None:
        """On for these places of heads by site, off for all others."""
        for name, switch in self.switches.items():
            switch.zero_()
            for place in heads.get(name, ()):
                switch[0, place] = True


def switched(gm: fx.GraphModule, found: Sequence[Found], edited: Mapping[str, AttentionSpec]) -> Switched:
    """A copy of ``gm`` with shared weights, in which heads of the sites in ``edited`` have a second form."""
    module, table = copy_program(gm)
    switches: dict[str, Tensor] = {}
    for f in found:
        name, raised = f.site.name, f.raised
        node = table[raised.node]
        table[raised.region.out.node].replace_all_uses_with(table[raised.out])
        emit = Emitter(module.graph, node, {"site": name})
        o = inline(emit, raised.spec, _backend(f, raised.spec), operands_of(node))
        if name in edited:
            other = inline(emit, edited[name], _backend(f, edited[name]), operands_of(node))
            switches[name] = torch.zeros(1, raised.spec.num_heads, 1, 1, dtype=torch.bool, device=o.meta["val"].device)
            held = store(module, f"switch_{len(switches)}", switches[name])
            with module.graph.inserting_before(node):
                switch = module.graph.get_attr(held)
            with emit.mode:
                switch.meta["val"] = torch.empty_like(switches[name])
            o = emit.call(aten.where.self, switch, other, o)
        node.replace_all_uses_with(o)
    share_equal_nodes(module)
    remove_unused_nodes(module)
    return Switched(module, switches)


def _backend(f: Found, spec: AttentionSpec) -> Backend:
    chosen = choose(backends_of("auto"), f.site, replace(f.site, spec=spec)).backend
    assert chosen is not None, "the reference backend computes every spec"
    return chosen
