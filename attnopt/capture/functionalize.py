"""A program of functional operators that the rest of attnopt reads."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.node import Argument

from attnopt.base.sizes import hint, is_static
from attnopt.capture.flex_attention import index_plainly
from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.input_sizes import InputSizes, read_sizes_from_inputs
from attnopt.graph.nodes import RESHAPES, arg, aten, is_call, operand, value
from attnopt.graph.value_names import inherit

higher_order = torch.ops.higher_order


# Composite operators that the rest of attnopt reads directly, or that ``tidy`` rewrites.
_READ = ("contiguous", "reshape", "to", "chunk", "expand_as", "type_as", "alias", "detach")
_VIEWS_UNSAID = ("atleast_1d", "atleast_2d", "atleast_3d", "unsafe_chunk")  # by their schemas


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The program without in-place writes and regions.

    torch retraces for this, which costs more than the export itself; most graphs are
    already functional.
    """
    if all(map(_is_functional, exported.graph.nodes)):
        return exported
    index_plainly(exported.graph_module)
    with _node_by_node(exported.graph_module):
        decomposed: ExportedProgram = exported.run_decompositions({})
    return decomposed


@contextmanager
def _node_by_node(gm: fx.GraphModule) -> Iterator[None]:
    """Regions of a mode (autocast, no_grad) are inlined: their nodes keep names and source lines."""
    found = [
        region
        for owner in gm.modules()
        if isinstance(owner, fx.GraphModule)
        for node in owner.graph.nodes
        if node.target in (higher_order.wrap_with_autocast, higher_order.wrap_with_set_grad_enabled)
        for name in node.all_input_nodes
        if name.op == "get_attr" and isinstance(region := getattr(owner, str(name.target)), fx.GraphModule)
    ]
    for region in found:
        region.forward = fx.Interpreter(region).run
    try:
        yield
    finally:
        for region in found:
            del region.forward


def _is_functional(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return False
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return not isinstance(op, torch._ops.HigherOrderOperator) and op.__module__ != "torch._functorch.predispatch"
    return not op._schema.is_mutable or op is aten.detach_.default


def expand_views(gm: fx.GraphModule) -> None:
    """Replace each composite view (``x.T``, ``x.narrow(...)``, a flatten of free sizes) by the operators it consists of.

    Node by node: torch's own decomposition retraces the whole program.
    """
    nodes = list(gm.graph.nodes)
    emit = Emitter(gm.graph, nodes[0])
    for node in nodes:
        if is_call(node, aten.sym_size.int):
            emit.reuse(node)
        elif is_call(node, aten.detach_.default):  # changes no value
            node.target = aten.alias.default
        elif node.op == "call_function" and _is_composite_view(node):
            emit.before = node
            _expand(node, emit)
    _write_sizes(gm.graph)
    remove_unused_nodes(gm)


def _write_sizes(graph: fx.Graph) -> None:
    """Also the -1 of a reshape, which a selection of heads may need."""
    sizes = read_sizes_from_inputs(graph)
    for node in list(graph.nodes):
        if is_call(node, *RESHAPES) and -1 in arg(node, 1):
            written = [_written(sizes, *s) for s in zip(arg(node, 1), value(node).shape, strict=True)]
            node.args = (operand(node), written)


def _written(sizes: InputSizes, asked: Argument, size: int | torch.SymInt) -> Argument:
    if asked != -1:
        return asked
    if isinstance(size, int) or is_static(size):
        return hint(size)
    found = sizes.read(size)
    return asked if found is None else found


def _expand(node: fx.Node, emit: Emitter) -> None:
    target: Any = node.target
    parts = list(node.users) if isinstance(value(node), (tuple, list)) else [None]  # getitems of a split
    for part in parts:

        def run(*inputs: Any, part: fx.Node | None = part) -> Any:
            given = dict(zip(node.all_input_nodes, inputs, strict=True))
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
            made = target(*args, **kwargs)
            return made if part is None else made[part.args[1]]

        made = emit.inline(run, *node.all_input_nodes, pre_dispatch=False)
        inherit(made, part or node)
        (part or node).replace_all_uses_with(made)


def _is_composite_view(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return False
    name: str = op.overloadpacket.__name__
    if name in ("flatten", "unflatten"):
        return not all(map(is_static, value(node).shape))
    if name in _READ or not (name in _VIEWS_UNSAID or any(r.alias_info for r in op._schema.returns)):
        return False
    composite: bool = torch._C._dispatch_has_kernel_for_dispatch_key(
        op._schema.name + ("." + op._overloadname if op._overloadname != "default" else ""), "CompositeImplicitAutograd"
    )
    return composite
