"""A graph as torch's ExportedProgram."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling, mode_of
from attnopt.base.quiet import quiet
from attnopt.base.sizes import is_static
from attnopt.base.trees import in_lists
from attnopt.graph.nodes import inputs_of, value


@compiling()
def exported(module: fx.GraphModule, inputs: CallInputs) -> ExportedProgram:
    """The graph with example inputs as an ExportedProgram, with the dynamic axes of its capture."""
    with quiet(), mode_of(module), _one_size_for_one_symbol(module):
        return torch.export.export(
            module,
            *inputs,
            dynamic_shapes=_shapes_of(module, inputs),
            strict=False,
        )


@contextmanager
def _one_size_for_one_symbol(module: fx.GraphModule) -> Iterator[None]:
    """Inside, the graph says which axes of its inputs are of one length: torch cannot tell where no operator shows it."""
    inputs, known = inputs_of(module.graph), set(module.graph.nodes)
    first: dict[object, tuple[fx.Node, int]] = {}
    for node in inputs:
        for axis, size in enumerate(value(node).shape if isinstance(value(node), Tensor) else ()):
            if is_static(size) or (same := first.setdefault(size.node.expr, (node, axis)))[0] is node:
                continue
            with module.graph.inserting_after(inputs[-1]):
                pair = [module.graph.call_function(torch.ops.aten.sym_size.int, x) for x in (same, (node, axis))]
            with module.graph.inserting_after(pair[0]):
                equal = module.graph.call_function(operator.eq, tuple(pair))
            with module.graph.inserting_after(equal):
                module.graph.call_function(torch._check, (equal,))
    added = [n for n in module.graph.nodes if n not in known]
    if not added:
        yield
        return
    module.recompile()
    try:
        yield
    finally:
        for node in reversed(added):
            module.graph.erase_node(node)
        module.recompile()


def _shapes_of(module: fx.GraphModule, inputs: CallInputs) -> Any:
    """Dynamic shapes read from the graph: an axis with a symbol is dynamic and must not become static."""
    shapes = [_dynamic(value(n)) for n in inputs_of(module.graph)]
    if not any(shapes):
        return None
    left = iter(shapes)
    positional, keywords = in_lists(tuple(inputs), lambda _: next(left))
    from torch.export._trace import _get_forward_arg_names

    names = _get_forward_arg_names(module, *inputs)
    return dict(zip(names, (*positional, *keywords.values()), strict=True))


def _dynamic(val: object) -> object:
    if isinstance(val, torch.SymInt):
        return Dim.AUTO
    if not isinstance(val, Tensor):
        return None
    return {i: Dim.AUTO for i, s in enumerate(val.shape) if not is_static(s)} or None
