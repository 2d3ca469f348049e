"""A graph entirely in double precision: a remaining difference between two graphs is not rounding."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

T = TypeVar("T")
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def widened(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with its weights and every cast in double precision; parts in half precision are so too."""
    made = copy.deepcopy(gm).double()
    for node in made.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = widened_arguments((node.args, node.kwargs))
    made.recompile()
    return made


def widened_arguments(arguments: T) -> T:
    """Of a call: every dtype that is narrower becomes double precision."""
    made: T = pytree.tree_map(_wide, arguments)
    return made


def widened_inputs(inputs: T) -> T:
    made: T = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    return made


def _wide(x: object) -> object:
    return torch.float64 if isinstance(x, torch.dtype) and x in _NARROW else x
