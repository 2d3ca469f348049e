"""An optimized graph as the graph that one of several ranks runs, for the sizes of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from attnopt.distributed.attend import Attend, Attention
from attnopt.distributed.attention_arguments import CORES, AttentionCall, attention_call
from attnopt.distributed.placement import Form, Placement, at_node
from attnopt.distributed.ranks import Ranks
from attnopt.distributed.shards import Rounds, Shards
from attnopt.distributed.token_moves import Collect, TakeOwn
from attnopt.distributed.token_rules import SIZED, Needed, Tokens
from attnopt.errors import DistributedError
from attnopt.graph.nodes import RESHAPES, aten, calls, inputs_of, is_call, opname, run_call, written
from attnopt.graph.ops import Kind, of


@dataclass(frozen=True)
class Cost:
    """``bytes`` of the keys and values of one token, in all sequences of the batch."""

    attention: Attention
    bytes: int


@dataclass(frozen=True, eq=False)
class Sharded:
    """``module``: what this rank runs.  ``collected``: name and bytes of each tensor that all ranks collect; ``axes``: of each
    output that is the rank's own tokens, their axis."""

    module: fx.GraphModule
    shards: Shards
    attentions: tuple[Cost, ...]
    collected: tuple[tuple[str, int], ...]
    axes: tuple[int | None, ...]


def sharded(gm: fx.GraphModule, inputs: Sequence[object], ranks: Ranks, *, zigzag: bool | None, whole: bool) -> Sharded:
    """For flat ``inputs``.  ``zigzag`` None: where an attention is causal without a window; ``whole``: outputs are collected.

    Raises DistributedError."""
    if names := written(gm):
        raise DistributedError(
            f"the model writes to its state {names[0]}", hint="optimize it without a cache of its own"
        )
    cores = [attention_call(n) for n in gm.graph.nodes if is_call(n, *CORES)]
    if not cores:
        raise DistributedError(
            "the graph has no attention in one operator, which ranks can share", hint='optimize with backend="blocked"'
        )
    values = _values(gm, inputs)
    length = _length(cores, values)
    is_causal = any(c.pattern.is_causal and c.pattern.look_back is None for c in cores)
    shards = Shards.of(length, ranks.size, is_causal if zigzag is None else zigzag)
    placement = Placement(gm.graph, values, {c.node: c for c in cores}, length)
    placement.place()
    return _Emission(gm, placement, shards, ranks).run(whole)


def _values(gm: fx.GraphModule, inputs: Sequence[object]) -> dict[fx.Node, Any]:
    """Of every node at these sizes: tensors without data, and numbers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values: dict[fx.Node, Any] = dict(zip(inputs_of(gm.graph), inputs, strict=True))
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                x = values[node] if node.op == "placeholder" else attrgetter(str(node.target))(gm)
                values[node] = mode.from_tensor(x) if isinstance(x, Tensor) else x
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = run_call(node, args, kwargs)
                except Exception as e:
                    raise at_node(
                        node, f"has a result whose size is not known before the call: {type(e).__name__}"
                    ) from e
    return values


def _length(cores: Sequence[AttentionCall], values: Mapping[fx.Node, Any]) -> int:
    found: dict[int, AttentionCall] = {}
    for c in cores:
        q, k = (int(values[n].shape[2]) for n in c.operands[:2] if n is not None)
        if q != k:
            raise c.error(
                f"it has {q} queries and {k} keys, and ranks share only attentions of a sequence to itself",
                "run models with cross-attention, or with a cache of keys, on one rank",
            )
        found.setdefault(q, c)
    if len(found) > 1:
        (a, first), (b, other), *_ = found.items()
        raise other.error(f"it attends over {b} tokens, {first.site} over {a}", "run this model on one rank")
    return next(iter(found))


@dataclass(eq=False)
class _Emission:
    gm: fx.GraphModule
    placement: Placement
    shards: Shards
    ranks: Ranks
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[tuple[fx.Node, Form], Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)  # what the new graph reads and calls
    attentions: list[Cost] = field(default_factory=list)
    collected: list[tuple[str, int]] = field(default_factory=list)

    def run(self, whole: bool) -> Sharded:
        (output,) = self.gm.graph.find_nodes(op="output")
        leaves, tree = pytree.tree_flatten(output.args[0])
        forms = {x: None if whole else self._own_form(x) for x in leaves if isinstance(x, fx.Node)}
        self.placement.want(forms)
        for node in self.gm.graph.nodes:
            self._copy(node)
        flat = [self._read(x, forms[x]) if isinstance(x, fx.Node) else x for x in leaves]
        self.graph.output(pytree.tree_unflatten(flat, tree))
        self.graph.set_codegen(self.gm.graph._codegen)
        module = fx.GraphModule(self.parts, self.graph)
        for name in ("_in_spec", "_out_spec"):
            if hasattr(self.gm, name):
                setattr(module, name, getattr(self.gm, name))
        axes = tuple(None if (form := forms.get(x)) is None else form.axis for x in leaves)
        return Sharded(module, self.shards, tuple(self.attentions), tuple(self.collected), axes)

    def _own_form(self, node: fx.Node) -> Form:
        at = self.placement.places.get(node)
        return at if at is not None and at == Tokens(at.axis) else None

    def _copy(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.made[node, None] = self.graph.node_copy(node)
        elif node.op == "call_module" and not node.users:  # the constraints on sizes, which whole inputs keep
            self.parts[str(node.target)] = getattr(self.gm, str(node.target))
            self.graph.node_copy(node, lambda n: self.made[n, None])
        for form in self.placement.forms(node):
            if (node, form) not in self.made:
                self.made[node, form] = self._form(node, form, self.placement.wanted[node][form])

    def _form(self, node: fx.Node, form: Form, need: Needed) -> fx.Node:
        if node in need:
            return self._moved(node, form, need[node])
        if node in self.placement.cores:
            return self._attention(self.placement.cores[node], need)
        if node.op == "get_attr":
            self.parts[str(node.target)] = attrgetter(str(node.target))(self.gm)
            return self.graph.get_attr(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._read(n, need.get(n)))
        if form is not None and calls(node, SIZED):
            args = self._sized(node, args, form)
        target: Any = aten.reshape.default if calls(node, RESHAPES) else node.target
        return self.graph.call_function(target, args, kwargs)

    def _read(self, node: fx.Node, form: Form) -> Any:
        return self.placement.values[node] if self.placement.is_number(node) else self.made[node, form]

    def _moved(self, node: fx.Node, form: Form, held: Form) -> fx.Node:
        """The own tokens of a whole tensor, or the whole of own tokens."""
        if form is not None:
            return self._call(f"own_{node.name}", TakeOwn(self.shards, self.ranks.rank, form), self.made[node, None])
        assert held is not None
        name, x = f"whole_{node.name}", self.placement.values[node]
        self.collected.append((f"{opname(node)} {tuple(x.shape)}", x.numel() * x.element_size()))
        return self._call(name, Collect(self.shards, self.ranks, held, name), self.made[node, held])

    def _attention(self, core: AttentionCall, need: Needed) -> fx.Node:
        rounds = Rounds.plan(core.pattern, core.heads, self.shards)
        attention = Attention(core.site, core.pattern, core.kv_of_head, core.scale, core.softcap, rounds, self.ranks)
        k, v = (self.placement.values[n] for n in core.operands[1:3] if n is not None)
        self.attentions.append(Cost(attention, sum(x.numel() * x.element_size() for x in (k, v)) // self.shards.length))
        operands = (None if n is None else self._read(n, need[n]) for n in core.operands)
        return self._call(f"attend_{core.node.name}", Attend(attention), *operands)

    def _call(self, name: str, part: nn.Module, *operands: Any) -> fx.Node:
        self.parts[name] = part
        return self.graph.call_module(name, operands)

    def _sized(self, node: fx.Node, args: Any, form: Tokens) -> Any:
        """With the sizes of the own tokens."""
        at = 1 if calls(node, of(Kind.RESHAPE, Kind.EXPAND)) else 0
        sizes = list(args[at])
        if sizes[form.axis] != -1:
            sizes[form.axis] = sizes[form.axis] // self.shards.length * self.shards.count(self.ranks.rank)
        return (*args[:at], sizes, *args[at + 1 :])
