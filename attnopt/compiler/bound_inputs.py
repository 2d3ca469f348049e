"""Sizes of the inputs that a policy reads: those of the tokens that they describe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from attnopt.base.sizes import hint, same_size
from attnopt.errors import RewriteError
from attnopt.graph.nodes import fake_mode, input_name, inputs_of, value
from attnopt.ir.call_segments import CallSegments
from attnopt.lower.lower import Plan


def bind_inputs(graph: fx.Graph, plans: Sequence[Plan]) -> None:
    """Give inputs that nothing in the model reads the sizes of the attentions that will read them.

    Raises RewriteError for an input whose length may differ from theirs.
    """
    nodes = {input_name(n): n for n in inputs_of(graph)}
    bound: set[str] = set()
    for plan in plans:
        if plan.spec.call_segments is None:
            continue
        for name, sizes in _sizes(plan, plan.spec.call_segments).items():
            ids = value(nodes[name])
            wanted = sizes[2 - ids.dim() :]
            if ids.dim() == 2 and hint(ids.shape[0]) == 1 and hint(wanted[0]) != 1:
                wanted = (1, wanted[1])
            if not _is_read(nodes[name]) and name not in bound:
                with fake_mode(graph):
                    nodes[name].meta["val"] = torch.empty(wanted, dtype=ids.dtype, device=ids.device)
                bound.add(name)
            elif not all(map(same_size, ids.shape, wanted)):
                raise RewriteError(
                    f"{name} is {_told(ids.shape)}, and the attention has {_told(wanted)}, which may differ in other calls",
                    site=plan.found.site.name,
                    hint="use one torch.export.Dim for both in dynamic_shapes, or an input for each sequence",
                )


def _sizes(plan: Plan, segments: CallSegments) -> dict[str, tuple[int, int]]:
    """Batch and length of each input."""
    operands = plan.found.raised.operands
    queries, keys = (value(x).shape for x in (operands.q, operands.k))
    return {segments.queries.name: (queries[0], queries[2]), segments.keys.name: (keys[0], keys[2])}


def _is_read(node: fx.Node) -> bool:
    """By more than the checks of its sizes."""
    return any(user.op != "call_module" for user in node.users)


def _told(sizes: Sequence[int | torch.SymInt]) -> str:
    return " x ".join(map(str, sizes))
