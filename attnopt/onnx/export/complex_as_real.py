"""Complex numbers as pairs of real ones, for operators that torch's exporter does not support on them.

The exporter writes a complex tensor as a real one with a last axis of length two, and supports few operators on it.  Those that
only rearrange elements become the same operators on pairs, with the last axis unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from torch import fx
from torch.fx.node import Argument, Target

from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import arg, aten, is_call, operand, value, wrap

# The new second argument of an operator, for a complex tensor with ``rank`` axes.
ON_PAIRS: Mapping[Target, Callable[[int, Any], Argument]] = {
    aten.unsqueeze.default: lambda rank, dim: wrap(dim, rank + 1),
    aten.squeeze.dims: lambda rank, dims: [wrap(dim, rank) for dim in dims],
    aten.expand.default: lambda _, sizes: [*sizes, 2],
    aten.repeat.default: lambda _, times: [*times, 1],
    aten.select.int: lambda rank, dim: wrap(dim, rank),
    aten.index_select.default: lambda rank, dim: wrap(dim, rank),
}


def in_pairs(gm: fx.GraphModule) -> None:
    """Changes each operator that arranges complex numbers into the one that arranges their pairs."""
    for node in list(gm.graph.nodes):
        if is_call(node, aten.split_with_sizes.default) and value(operand(node)).is_complex():
            _in_slices(node)
        if node.op != "call_function" or node.target not in ON_PAIRS or not value(node).is_complex():
            continue
        source, setting, *rest = node.args
        emit = Emitter(gm.graph, node)
        setting = ON_PAIRS[node.target](value(source).dim(), setting)
        made = emit.call(node.target, emit.call(aten.view_as_real.default, source), setting, *rest, **node.kwargs)
        node.replace_all_uses_with(emit.call(aten.view_as_complex.default, made))
        gm.graph.erase_node(node)
    remove_unused_nodes(gm)


def _in_slices(split: fx.Node) -> None:
    """Of several results the exporter has a form for each."""
    ends = list(accumulate(arg(split, 1)))
    for taken in list(split.users):
        i = arg(taken, 1)
        emit = Emitter(split.graph, taken)
        start = ends[i] - arg(split, 1)[i]
        taken.replace_all_uses_with(emit.call(aten.slice.Tensor, operand(split), arg(split, 2, 0), start, ends[i]))
        split.graph.erase_node(taken)
    split.graph.erase_node(split)
