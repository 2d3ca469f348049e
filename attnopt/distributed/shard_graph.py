"""An optimized graph as the graph that one of several ranks runs, for the sizes of one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from attnopt.distributed.attend import Attend
from attnopt.distributed.attention_arguments import AttentionCall
from attnopt.distributed.head_exchange import AttendByHeads, HeadAttention, HeadShares
from attnopt.distributed.key_rounds import Attention
from attnopt.distributed.layout import Layout, Sharing
from attnopt.distributed.placement import Form
from attnopt.distributed.ranks import Ranks
from attnopt.distributed.token_moves import Collect, TakeOwn
from attnopt.distributed.token_rules import SIZED, Needed, Tokens
from attnopt.graph.nodes import RESHAPES, aten, calls
from attnopt.graph.ops import Kind, of


@dataclass(frozen=True, eq=False)
class Sharded:
    """``module``: what this rank runs.  ``axes``: of each output that is the rank's own tokens, their axis."""

    module: fx.GraphModule
    layout: Layout
    axes: tuple[int | None, ...]


def sharded(gm: fx.GraphModule, inputs: Sequence[object], ranks: Ranks, sharing: Sharing) -> Sharded:
    """For flat ``inputs``.  Raises DistributedError."""
    return _Emission(Layout.of(gm, inputs, ranks.size, sharing), ranks).run()


@dataclass(eq=False)
class _Emission:
    layout: Layout
    ranks: Ranks
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[tuple[fx.Node, Form], Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)  # what the new graph reads and calls

    def run(self) -> Sharded:
        gm, forms = self.layout.gm, self.layout.forms
        leaves, tree = pytree.tree_flatten(gm.graph.output_node().args[0])
        for node in gm.graph.nodes:
            self._copy(node)
        flat = [self._read(x, forms[x]) if isinstance(x, fx.Node) else x for x in leaves]
        self.graph.output(pytree.tree_unflatten(flat, tree))
        self.graph.set_codegen(gm.graph._codegen)
        module = fx.GraphModule(self.parts, self.graph)
        for name in ("_in_spec", "_out_spec"):
            if hasattr(gm, name):
                setattr(module, name, getattr(gm, name))
        axes = tuple(None if (form := forms.get(x)) is None else form.axis for x in leaves)
        return Sharded(module, self.layout, axes)

    def _copy(self, node: fx.Node) -> None:
        gm, placement = self.layout.gm, self.layout.placement
        if node.op == "placeholder":
            self.made[node, None] = self.graph.node_copy(node)
        elif node.op == "call_module" and not node.users:  # the constraints on sizes, which whole inputs keep
            self.parts[str(node.target)] = getattr(gm, str(node.target))
            self.graph.node_copy(node, lambda n: self.made[n, None])
        for form in placement.forms(node):
            if (node, form) not in self.made:
                self.made[node, form] = self._form(node, form, placement.wanted[node][form])

    def _form(self, node: fx.Node, form: Form, need: Needed) -> fx.Node:
        if node in need:
            return self._moved(node, form, need[node])
        if node in self.layout.placement.cores:
            return self._attention(self.layout.placement.cores[node], need)
        if node.op == "get_attr":
            self.parts[str(node.target)] = attrgetter(str(node.target))(self.layout.gm)
            return self.graph.get_attr(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._read(n, need.get(n)))
        if form is not None and calls(node, SIZED):
            args = self._sized(node, args, form)
        target: Any = aten.reshape.default if calls(node, RESHAPES) else node.target
        return self.graph.call_function(target, args, kwargs)

    def _read(self, node: fx.Node, form: Form) -> Any:
        return self.layout.values[node] if self.layout.placement.is_number(node) else self.made[node, form]

    def _moved(self, node: fx.Node, form: Form, held: Form) -> fx.Node:
        """The own tokens of a whole tensor, or the whole of own tokens."""
        shards = self.layout.shards
        if form is not None:
            return self._call(f"own_{node.name}", TakeOwn(shards, self.ranks.rank, form), self.made[node, None])
        assert held is not None
        name = f"whole_{node.name}"
        return self._call(name, Collect(shards, self.ranks, held, name), self.made[node, held])

    def _attention(self, core: AttentionCall, need: Needed) -> fx.Node:
        way = self.layout.ways[core.node]
        meaning = (core.site, core.pattern, core.kv_of_head, core.scale, core.softcap)
        part: nn.Module
        if isinstance(way, HeadShares):
            part = AttendByHeads(HeadAttention(*meaning, way, self.ranks))
        else:
            part = Attend(Attention(*meaning, way, self.ranks, core.with_lse))
        operands = (None if n is None else self._read(n, need[n]) for n in core.operands)
        return self._call(f"attend_{core.node.name}", part, *operands)

    def _call(self, name: str, part: nn.Module, *operands: Any) -> fx.Node:
        self.parts[name] = part
        return self.graph.call_module(name, operands)

    def _sized(self, node: fx.Node, args: Any, form: Tokens) -> Any:
        """With the sizes of the own tokens."""
        at = 1 if calls(node, of(Kind.RESHAPE, Kind.EXPAND)) else 0
        sizes = list(args[at])
        if sizes[form.axis] != -1:
            shards = self.layout.shards
            sizes[form.axis] = sizes[form.axis] // shards.length * shards.count(self.ranks.rank)
        return (*args[:at], sizes, *args[at + 1 :])
