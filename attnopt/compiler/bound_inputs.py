"""Sizes of the inputs that a policy reads: those of what their axes count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from attnopt.base.sizes import hint, is_static, same_size
from attnopt.errors import RewriteError
from attnopt.graph.nodes import fake_mode, input_name, inputs_of, value
from attnopt.ir.call_tensor import BATCH, KEYS, QUERIES, CallTensor, Size
from attnopt.lower.lower import Plan


def bind_inputs(graph: fx.Graph, plans: Sequence[Plan]) -> None:
    """Give inputs that nothing in the model reads the sizes that the attentions which read them say.

    Raises RewriteError for an input whose size may differ from those.
    """
    nodes = {input_name(n): n for n in inputs_of(graph)}
    free = {name for name, node in nodes.items() if not _is_read(node)}
    for plan in plans:
        operands = plan.found.raised.operands
        q, k = value(operands.q).shape, value(operands.k).shape
        known: dict[str, Size] = {BATCH: q[0], QUERIES: q[2], KEYS: k[2]}
        for tensor in plan.spec.inputs:
            node, name = nodes[tensor.input.name], tensor.input.name
            now = value(node)
            known = {**tensor.lengths(now.shape), **known}
            wanted = _sizes(tensor, now.shape, known, name in free)
            if name in free:
                with fake_mode(graph):
                    node.meta["val"] = torch.empty(wanted, dtype=now.dtype, device=now.device)
                free.remove(name)
            elif not all(map(same_size, now.shape, wanted)):
                raise RewriteError(
                    f"{name} is {_told(now.shape)}, and the attention has {_told(wanted)}, which may differ in other calls",
                    site=plan.found.site.name,
                    hint="use one torch.export.Dim for equal lengths in dynamic_shapes, or an input for each attention",
                )


def _sizes(tensor: CallTensor, given: Sequence[Size], known: Mapping[str, Size], is_free: bool) -> tuple[Size, ...]:
    """Those of every call for an input that is ``given`` so in the example.  One for all sequences stays so."""
    counted = tensor.counted(len(given))
    sizes = tuple(known[axis] if isinstance(axis, str) else axis for axis in counted)
    is_for_all = counted[0] == BATCH and hint(given[0]) == 1
    if is_for_all and (hint(sizes[0]) != 1 or (is_static(given[0]) and not is_free)):
        return (1, *sizes[1:])
    return sizes


def _is_read(node: fx.Node) -> bool:
    """By more than the checks of its sizes."""
    return any(user.op != "call_module" for user in node.users)


def _told(sizes: Sequence[Size]) -> str:
    return " x ".join(map(str, sizes))
