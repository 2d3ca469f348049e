"""Fused projections: smaller projections of the same input joined into one.

A matrix product with few columns is slower per column: if heads were removed, queries, keys and values are projected
together, as the original model may have done.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, calls, get_attr, shape
from attnopt.graph.normalize import STRIDED
from attnopt.graph.ops import rules
from attnopt.slicing.weight_store import Weights


@dataclass(frozen=True)
class _Form:
    """Which arguments of an operator are the input, the weight and the bias, and the axis of the weight's output features."""

    input: int
    weight: int
    bias: int | None
    axis: int

    def held(self, node: fx.Node) -> list[Any]:
        """The weight, and the bias if any."""
        bias = node.args[self.bias] if self.bias is not None and self.bias < len(node.args) else None
        return [node.args[self.weight], *([] if bias is None else [bias])]


_FORMS = rules(
    {
        "linear": _Form(0, 1, 2, 0),
        "addmm": _Form(1, 2, 0, 1),
        "matmul mm": _Form(0, 1, None, 1),
    }
)


def join(gm: fx.GraphModule, weights: Weights) -> None:
    """Fuse projections of the same input whose weights ``weights`` created and nothing else uses."""
    if any(calls(n, STRIDED) for n in gm.graph.nodes):
        return
    groups = [g for g in _siblings(gm, weights) if len(g) > 1]
    together = Counter(_names(group) for group in groups)
    readers = Counter(n.target for node in gm.graph.nodes for n in node.all_input_nodes if n.op == "get_attr")
    for group in groups:
        names = _names(group)
        if all(readers[name] == together[names] for pair in names for name in pair):
            _join(gm, weights, group)
    remove_unused_nodes(gm)


def _siblings(gm: fx.GraphModule, weights: Weights) -> Iterable[list[fx.Node]]:
    """Products with new weights, grouped by what must be equal to fuse them."""
    found: dict[object, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        form = _FORMS.get(node.target)
        if form is None or node.kwargs:
            continue
        held = form.held(node)
        if all(isinstance(n, fx.Node) and n.op == "get_attr" and n.target in weights.origin for n in held):
            tensors = [get_attr(gm, str(n.target)) for n in held]
            if all(isinstance(t, nn.Parameter) and t.ndim == 2 - i for i, t in enumerate(tensors)):
                kind = tuple((t.dtype, t.device, t.requires_grad) for t in tensors)
                found.setdefault((node.target, node.args[form.input], kind), []).append(node)
    return found.values()


def _names(group: Sequence[fx.Node]) -> tuple[tuple[str, ...], ...]:
    """The weights of a group, then its biases, if it has any."""
    held = [_FORMS[node.target].held(node) for node in group]
    return tuple(tuple(str(n.target) for n in kind) for kind in zip(*held, strict=True))


def _join(gm: fx.GraphModule, weights: Weights, group: Sequence[fx.Node]) -> None:
    form, first = _FORMS[group[0].target], group[0]
    emit = Emitter(gm.graph, first, first.meta.get("attnopt"))
    args = list(first.args)
    weight, *biases = _names(group)
    args[form.weight] = weights.read(emit, weights.join(weight, form.axis))
    for names in biases:
        assert form.bias is not None
        args[form.bias] = weights.read(emit, weights.join(names, 0))
    sizes = [shape(n)[-1] for n in group]
    every = emit.call(first.target, *args)
    parts = emit.call(aten.split_with_sizes.default, every, sizes, -1)
    made = [emit.call(operator.getitem, parts, i) for i in range(len(group))]
    for node, part in zip(group, made, strict=True):
        node.replace_all_uses_with(part)
        gm.graph.erase_node(node)
