"""Calls that torch.compile can trace: tensors in the form in which the graph was captured, compared with plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx

from attnopt.capture.signature import Signature
from attnopt.graph.nodes import inputs_of


@dataclass(frozen=True)
class PlainCall:
    """``sizes``: of each input's axes, -1 where they vary.  ``equal``: pairs of (input, axis) whose sizes are one.  The last
    inputs are ``keywords``, the others positional."""

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[tuple[int, ...], ...]
    equal: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    keywords: tuple[str, ...]

    @classmethod
    def of(cls, module: fx.GraphModule, signature: Signature) -> PlainCall | None:
        """None if the graph takes other things than tensors, or sizes that are computed from others."""
        values = [node.meta.get("val") for node in inputs_of(module.graph)]
        if not _are_tensors(values) or len(values) != len(signature.positional) + len(signature.keywords):
            return None
        first: dict[object, tuple[int, int]] = {}
        equal: list[tuple[tuple[int, int], tuple[int, int]]] = []
        for i, x in enumerate(values):
            for axis, size in enumerate(x.shape):
                if isinstance(size, int):
                    continue
                if not size.node.expr.is_symbol:
                    return None
                there = first.setdefault(size.node.expr, (i, axis))
                if there != (i, axis):
                    equal.append((there, (i, axis)))
        sizes = tuple(tuple(size if isinstance(size, int) else -1 for size in x.shape) for x in values)
        return cls(tuple(x.dtype for x in values), sizes, tuple(equal), signature.keywords)

    def takes(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Whether the graph takes this call as it is, its keywords in any order."""
        if len(args) + len(self.keywords) != len(self.sizes) or len(kwargs) != len(self.keywords):
            return False
        if not all(name in kwargs for name in self.keywords):
            return False
        given = [*args, *(kwargs[name] for name in self.keywords)]
        return _are_tensors(given) and self._fits(given)

    def _fits(self, given: list[Tensor]) -> bool:
        for dtype, sizes, x in zip(self.dtypes, self.sizes, given, strict=True):
            if x.dtype != dtype or x.dim() != len(sizes):
                return False
            if any(n not in (-1, m) for n, m in zip(sizes, x.shape, strict=True)):
                return False
        return all(given[i].shape[a] == given[j].shape[b] for (i, a), (j, b) in self.equal)


def _are_tensors(values: list[object]) -> TypeGuard[list[Tensor]]:
    return all(isinstance(x, Tensor) for x in values)
