"""New parameters of a graph module, derived from its old ones: reduced, edited, or concatenated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnopt.base.split_weight import split_like
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import get_attr
from attnopt.graph.select import Selection
from attnopt.graph.store import store


class Weights:
    """New parameters of a graph module, derived from its old ones.  The same derivation gives the same parameter."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.origin: dict[str, str] = {}  # new name -> the name of its origin
        self._made: dict[Any, str] = {}

    def derive(self, name: str, selection: Selection, edited: Tensor | None = None) -> str:
        """The name of the parameter ``name`` restricted to ``selection``; ``edited`` replaces its value."""
        key = (name, tuple(sorted(selection.items())), None if edited is None else fingerprint(edited))
        if key not in self._made:
            source = get_attr(self.gm, name)
            tensor = source.detach() if edited is None else edited.to(source.dtype)
            for axis, idx in selection.items():
                tensor = tensor.index_select(axis, torch.as_tensor(idx, device=tensor.device))
            self._made[key] = self._register(name, source, tensor.contiguous())
        return self._made[key]

    def join(self, names: Sequence[str], axis: int) -> str:
        """The name of one parameter with these concatenated along ``axis``, in this order."""
        key = (tuple(names), axis)
        if key not in self._made:
            parts = [get_attr(self.gm, n) for n in names]
            origins = dict.fromkeys(self.origin[n] for n in names)
            self._made[key] = self._register(
                _together(list(origins)), parts[0], torch.cat([t.detach() for t in parts], axis)
            )
        return self._made[key]

    def read(self, emit: Emitter, name: str) -> fx.Node:
        """The node that reads the parameter ``name``."""
        for node in emit.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                existing: fx.Node = node
                return existing
        with emit.graph.inserting_before(next(iter(emit.graph.nodes))):
            made = emit.graph.get_attr(name)
        tensor = get_attr(self.gm, name)
        with emit.mode:
            made.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return made

    def _register(self, name: str, source: Tensor, tensor: Tensor) -> str:
        tensor = split_like(tensor, source)
        is_parameter = isinstance(source, nn.Parameter)
        held = nn.Parameter(tensor, requires_grad=source.requires_grad) if is_parameter else tensor
        new = store(self.gm, name, held)
        self.origin[new] = self.origin.get(name, name)
        return new

    def settle(self) -> None:
        """Give each new parameter the name of its origin if that is no longer used."""
        used = {str(n.target) for n in self.gm.graph.nodes if n.op == "get_attr"}
        for new, old in self.origin.items():
            rivals = [m for m, o in self.origin.items() if o == old and m in used]
            if new not in used or old in used or len(rivals) > 1:
                continue
            owner, _, leaf = new.rpartition(".")
            module, target = self.gm.get_submodule(owner), old.rpartition(".")[2]
            tensor = getattr(module, leaf)
            delattr(module, leaf)
            if hasattr(module, target):
                delattr(module, target)
            setattr(module, target, tensor) if isinstance(tensor, nn.Parameter) else module.register_buffer(
                target, tensor
            )
            for node in self.gm.graph.nodes:
                if node.op == "get_attr" and node.target == new:
                    node.target = old


def _together(names: Sequence[str]) -> str:
    """A name for the concatenation of these parameters in their module: ``attention.query_key_value.weight``."""
    if len(names) == 1:
        return names[0]
    paths = [n.split(".") for n in names]
    common = len([*takewhile(lambda level: len({*level}) == 1, zip(*(p[:-1] for p in paths), strict=False))])
    leaves = {p[-1] for p in paths}
    alike = len(leaves) == 1 and all(len(p) > common + 1 for p in paths)
    joined = "_".join("_".join(p[common:-1] if alike else p[common:]) for p in paths)
    return ".".join((*paths[0][:common], joined, *(leaves if alike else ())))


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Equal only for equal tensors."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(data.numpy().data).hexdigest()
