"""Inputs that a policy reads: their names, and their sizes, those of the tokens that they describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.input import Input
from attnopt.base.sizes import hint, same_size
from attnopt.errors import PolicyError, RewriteError
from attnopt.graph.nodes import fake_mode, input_name, inputs_of, is_read, value
from attnopt.ir.call_segments import CallSegments
from attnopt.lower.lower import Plan


def bind_inputs(graph: fx.Graph, plans: Sequence[Plan]) -> None:
    """Give inputs that nothing in the model reads the sizes of the attentions that will read them.

    Raises RewriteError for an input whose length may differ from theirs.
    """
    nodes = {input_name(n): n for n in inputs_of(graph)}
    bound: set[str] = set()
    for plan in plans:
        if plan.spec.segments is None:
            continue
        for name, sizes in _sizes(plan, plan.spec.segments).items():
            ids = value(nodes[name])
            wanted = sizes[2 - ids.dim() :]
            if ids.dim() == 2 and hint(ids.shape[0]) == 1 and hint(wanted[0]) != 1:
                wanted = (1, wanted[1])
            if not is_read(nodes[name]) and name not in bound:
                with fake_mode(graph):
                    nodes[name].meta["val"] = torch.empty(wanted, dtype=ids.dtype, device=ids.device)
                bound.add(name)
            elif not all(map(same_size, ids.shape, wanted)):
                raise RewriteError(
                    f"{name} is {_told(ids.shape)}, and the attention has {_told(wanted)}, which may differ in other calls",
                    site=plan.found.site.name,
                    hint="use one torch.export.Dim for both in dynamic_shapes, or an input for each sequence",
                )


def check_names(graph: fx.Graph, arguments: Mapping[str, object], wanted: Iterable[Input]) -> None:
    """``arguments``: of the call that ``graph`` was captured with, by name.  Raises PolicyError where one of ``wanted`` has
    another name in the graph: a tensor inside of another argument has its own."""
    names = {i.name for i in wanted}
    nodes = iter(inputs_of(graph))
    for name, x in arguments.items():
        own = [input_name(next(nodes)) for _ in pytree.tree_leaves(x)]
        if name in names and isinstance(x, Tensor) and own != [name]:
            raise PolicyError(
                f"the policy reads the input {name}, but a tensor inside of another argument has this name in the graph",
                hint=f"choose another name than {name} for the input",
            )


def _sizes(plan: Plan, segments: CallSegments) -> dict[str, tuple[int, int]]:
    """Batch and length of each input."""
    operands = plan.found.raised.operands
    queries, keys = (value(x).shape for x in (operands.q, operands.k))
    return {segments.queries.name: (queries[0], queries[2]), segments.keys.name: (keys[0], keys[2])}


def _told(sizes: Sequence[int | torch.SymInt]) -> str:
    return " x ".join(map(str, sizes))
