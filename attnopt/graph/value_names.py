"""Names of a file's values in the graph that is captured of it: marks while it is traced, then notes on the nodes."""

from __future__ import annotations

import torch
from torch import Tensor, fx

NAMES = "onnx"  # in a node's meta: the names that the file has for the value
ORIGIN = "onnx_origin"  # and the name of the node in the captured graph


@torch.library.custom_op("attnopt::named", mutates_args=())
def named(x: Tensor, name: str) -> Tensor:
    """``x``, which the file calls ``name``."""
    return x.clone()


@named.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def unmark(gm: fx.GraphModule) -> None:
    """Every mark becomes a note on the node that it is put on."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.attnopt.named.default:
            x, name = node.args
            assert isinstance(x, fx.Node)
            x.meta[NAMES] = (*names_of(x), str(name))
            node.replace_all_uses_with(x)
            gm.graph.erase_node(node)


def number(gm: fx.GraphModule) -> None:
    """Tag each node with its identity, so copies of the graph can be compared with this one."""
    for node in gm.graph.nodes:
        node.meta[ORIGIN] = node.name


def names_of(node: fx.Node) -> tuple[str, ...]:
    found: tuple[str, ...] = node.meta.get(NAMES, ())
    return found


def inherit(made: fx.Node, replaced: fx.Node) -> None:
    """``made`` has the value of ``replaced``, and takes its names."""
    if names := names_of(replaced):
        made.meta[NAMES] = tuple(dict.fromkeys((*names_of(made), *names)))
