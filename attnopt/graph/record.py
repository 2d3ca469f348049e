"""Running a graph, and keeping what some of its nodes give."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


def recorded(gm: fx.GraphModule, nodes: Collection[fx.Node], inputs: Any) -> dict[fx.Node, Any]:
    """What ``nodes`` give where the graph is called with the leaves of ``inputs``; tensors are copies."""
    run = _Recorder(gm, nodes)
    with torch.no_grad():
        run.run(*pytree.tree_leaves(inputs))
    return run.found


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, nodes: Collection[fx.Node]) -> None:
        super().__init__(gm)
        self.nodes, self.found = set(nodes), dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes:  # a copy: a later operator may write into it
            self.found[n] = result.detach().clone() if isinstance(result, Tensor) else result
        return result
