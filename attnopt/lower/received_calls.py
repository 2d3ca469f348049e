"""Weights that keys receive, in plain operators, for runtimes without an operator that sums them without a map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import is_call
from attnopt.ir.received_weights import RECEIVED, written_out


def write_out_received(graph: fx.Graph) -> None:
    """Replace every call of ``attnopt::received_weights`` by what it computes, with the map of its queries."""
    for call in list(graph.nodes):
        if not is_call(call, RECEIVED):
            continue
        given = [x for x in call.args[:6] if isinstance(x, fx.Node)]
        call.replace_all_uses_with(Emitter(graph, call).inline(partial(_summed, call.args), *given))
        graph.erase_node(call)


def _summed(arguments: Sequence[Any], *tensors: Tensor) -> Tensor:
    """``tensors`` in the places of the nodes among the arguments."""
    rest = iter(tensors)
    filled: list[Any] = [next(rest) if isinstance(x, fx.Node) else x for x in arguments]
    return written_out(*filled)
