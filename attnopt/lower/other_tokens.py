"""The keys and values of other tokens as nodes of a graph: by the same operators and weights as the tokens' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.interpreter import Interpreter
from attnopt.graph.nodes import ancestors, aten, dtype, get_attr, input_name, inputs_of, value
from attnopt.ir.call_tensor import CallTensor, Source
from attnopt.ir.extended_keys import ExtendedKeys
from attnopt.match.find import Found
from attnopt.match.token_path import TokenPath, emitted


@dataclass(frozen=True)
class OtherTokens:
    """All of their canonical keys and values, the nodes ``made`` for those of the path, and ``seen`` as of ``MoreKeys``."""

    k: fx.Node
    v: fx.Node
    seen: fx.Node | None
    made: Mapping[fx.Node, fx.Node]


@dataclass(frozen=True)
class MoreNodes:
    """``MoreKeys`` as nodes."""

    k: fx.Node
    v: fx.Node
    seen: fx.Node | None

    @property
    def given(self) -> tuple[fx.Node, ...]:
        return (self.k, self.v, *(() if self.seen is None else (self.seen,)))

    def once(self, emit: Emitter) -> MoreNodes:
        """What no input changes is computed now, and stored."""
        return MoreNodes(_stored(emit, self.k), _stored(emit, self.v), self.seen)


def other_tokens(emit: Emitter, found: Found, extension: ExtendedKeys, here: Mapping[fx.Node, fx.Node]) -> OtherTokens:
    """``here``: the nodes of the graph that is written for those of the one in which the site was found."""
    path = found.path
    assert isinstance(path, TokenPath), "a pass checks it first"
    features = _tensor(emit, extension.reference, dtype(path.source), value(path.source).device, 3)
    made = emitted(path, emit, features, here)
    seen = None
    if extension.mask is not None:
        seen = _tensor(emit, extension.mask, torch.bool, value(path.source).device, 2)
    return OtherTokens(made[path.k], made[path.v], seen, {here[n]: node for n, node in made.items()})


def input_of(emit: Emitter, given: CallTensor) -> fx.Node:
    """The argument that brings it."""
    return next(n for n in inputs_of(emit.graph) if input_name(n) == given.input.name)


def _tensor(emit: Emitter, given: Source, kind: torch.dtype, device: torch.device, ndim: int) -> fx.Node:
    """With an axis for the batch, and elements of this kind."""
    node = input_of(emit, given) if isinstance(given, CallTensor) else emit.constant(given.tensor(device))
    if len(value(node).shape) < ndim:
        node = emit.call(aten.unsqueeze.default, node, 0)
    return node if kind == dtype(node) else emit.call(aten._to_copy.default, node, dtype=kind)


def _stored(emit: Emitter, node: fx.Node) -> fx.Node:
    gm = emit.graph.owning_module
    assert isinstance(gm, fx.GraphModule)
    above = list(ancestors(node))
    held = [n for n in above if n.op == "get_attr"]
    if any(n.op == "placeholder" for n in above) or any(get_attr(gm, str(n.target)).is_meta for n in held):
        return node
    known = Interpreter(gm)(node)
    assert isinstance(known, Tensor)
    return emit.constant(known.contiguous())
