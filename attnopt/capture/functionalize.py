"""A program of functional operators that the rest of attnopt reads."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx
from torch.export import ExportedProgram

from attnopt.base.sizes import is_static
from attnopt.capture.flex_attention import index_plainly

higher_order = torch.ops.higher_order


# Composite operators that the rest of attnopt reads directly, or that ``tidy`` rewrites.
_READ = (
    "matmul", "linear", "softmax", "log_softmax", "scaled_dot_product_attention", "einsum", "layer_norm", "rms_norm",
    "dropout", "contiguous", "reshape", "to", "chunk", "flatten", "unflatten", "expand_as", "batch_norm", "conv1d", "conv2d",
    "where", "__and__", "__or__", "repeat_interleave", "type_as", "alias", "detach", "silu", "gelu", "embedding", "group_norm",
)  # fmt: skip


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The program without in-place writes, regions and unsupported composite operators.

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
    if op._schema.is_mutable:
        return False
    if op.overloadpacket.__name__ in ("flatten", "unflatten") and not all(map(is_static, node.meta["val"].shape)):
        return False
    name: str = op._schema.name + ("." + op._overloadname if op._overloadname != "default" else "")
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return not composite or op.overloadpacket.__name__ in _READ or op.namespace != "aten"
