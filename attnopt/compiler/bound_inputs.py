"""Inputs that a policy reads: their names, and their sizes, those of what their axes count."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.input import Input
from attnopt.base.sizes import hint, is_static, same_size
from attnopt.capture.program import Program
from attnopt.capture.second_example import faded
from attnopt.errors import PolicyError, RewriteError
from attnopt.graph.nodes import fake_mode, input_name, inputs_of, is_read, value
from attnopt.ir.call_tensor import BATCH, KEYS, QUERIES, Size
from attnopt.ir.site import Site
from attnopt.lower.lower import Plan


def bound(program: Program, plans: Sequence[Plan]) -> Program:
    """``program``, in which inputs that nothing in the model reads have the sizes of the attentions that will read them.

    Raises RewriteError for an input whose size may differ from theirs.
    """
    graph = program.module.graph
    nodes = {input_name(n): n for n in inputs_of(graph)}
    free = {name for name, node in nodes.items() if not is_read(node)}
    known: set[str] = set()  # those of them that have their sizes
    for plan in plans:
        operands, site = plan.found.raised.operands, plan.found.site
        q, k = value(operands.q).shape, value(operands.k).shape
        lengths: dict[str, Size] = {BATCH: q[0], QUERIES: q[2], KEYS: k[2]}
        for tensor in plan.spec.inputs:
            node, name = nodes[tensor.input.name], tensor.input.name
            now, counted = value(node), tensor.counted(value(node).dim())
            lengths = {**tensor.lengths(now.shape), **lengths}
            wanted = [lengths[axis] if isinstance(axis, str) else axis for axis in counted]
            is_open = name in free and name not in known
            if counted[0] == BATCH and _is_for_all(site, name, None if is_open else now.shape[0]):
                wanted[0] = 1
            if is_open:
                with fake_mode(graph):
                    node.meta["val"] = torch.empty(wanted, dtype=now.dtype, device=now.device)
                known.add(name)
            elif not all(map(same_size, now.shape, wanted)):
                raise RewriteError(
                    f"{name} is {_told(now.shape)}, and the attention has {_told(wanted)}, which may differ in other calls",
                    site=plan.found.site.name,
                    hint="in dynamic_shapes, use one torch.export.Dim for equal lengths and no axis for a number of heads or "
                    "features; or use an input for each attention",
                )
    fixed = tuple(line for line in program.fixed_axes if line.partition("[")[0] not in known)
    return replace(program, inputs=_fitting(program, known), fixed_axes=fixed)


def check_names(graph: fx.Graph, arguments: Mapping[str, object], wanted: Iterable[Input]) -> None:
    """``arguments``: of the call that ``graph`` was captured with, by name.  Raises PolicyError where one of ``wanted`` has
    another name in the graph: a tensor inside of another argument has its own."""
    names = {i.name for i in wanted}
    nodes = iter(inputs_of(graph))
    for name, x in arguments.items():
        own = [input_name(next(nodes)) for _ in pytree.tree_leaves(x)]
        if name in names and own == [name.lower()] != [name]:
            raise PolicyError(
                f"the policy reads the input {name}, but torch.export writes names of inputs in lower case",
                hint=f"call the input {name.lower()}",
            )
        if name in names and isinstance(x, Tensor) and own != [name]:
            raise PolicyError(
                f"the policy reads the input {name}, but a tensor inside of another argument has this name in the graph",
                hint=f"choose another name than {name} for the input",
            )


def _is_for_all(site: Site, name: str, batch: Size | None) -> bool:
    """An input for one sequence is one for all of them, unless the example has only one, or the ``batch`` of the input, if it is
    settled, may be another."""
    if batch is None:
        return site.inputs[name].shape[0] == 1 != site.own_sizes[BATCH]
    return is_static(batch) and int(batch) == 1


def _fitting(program: Program, names: Collection[str]) -> CallInputs:
    """The example, with these inputs of the user's repeated where the program was captured with a longer one."""
    leaves, spec = pytree.tree_flatten(program.inputs)
    own = pytree.tree_leaves(program.own or program.inputs)
    for i, node in enumerate(inputs_of(program.module.graph)):
        if input_name(node) not in names:
            continue
        leaves[i] = own[i]
        for axis, size in enumerate(value(node).shape):
            times = max(1, hint(size) // own[i].shape[axis])  # of a batch that folds several axes, only one is longer
            leaves[i] = torch.cat([faded(leaves[i], n) for n in range(times)], axis)
    made: CallInputs = pytree.tree_unflatten(leaves, spec)
    return made


def _told(sizes: Sequence[Size]) -> str:
    return " x ".join(map(str, sizes))
