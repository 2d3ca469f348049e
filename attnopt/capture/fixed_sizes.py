"""Sizes that tracing fixed: asked to vary, but the graph is valid at one number alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from attnopt.base.sizes import hint, is_static
from attnopt.graph.nodes import fake_mode

_TRIED = range(2, 65)  # sizes that a guard might allow beside the example's; also its first multiples
_MULTIPLES = range(2, 17)


def settle_sizes(module: fx.GraphModule) -> None:
    """Every fixed size becomes an ordinary number."""
    for size in _pinned(module):
        int(size)  # torch records that it is this number
    mode = fake_mode(module.graph)
    for node in module.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor) and any(isinstance(s, torch.SymInt) and is_static(s) for s in val.shape):
            sizes, strides = ([int(s) if is_static(s) else s for s in given] for given in (val.shape, val.stride()))
            with mode:
                node.meta["val"] = torch.empty_strided(sizes, strides, dtype=val.dtype, device=val.device)


def _pinned(module: fx.GraphModule) -> Iterator[torch.SymInt]:
    """Sizes of inputs for which a guard such as ``s // 2 == 1``, with others, allows the example's number alone.

    torch finds some of these only when it traces once more, as lowering does.  A size is also taken for pinned where
    only numbers allow it that were not tried: it is then reported as static, which is never wrong.
    """
    shape_env = getattr(fake_mode(module.graph), "shape_env", None)
    if shape_env is None:
        return
    of_symbol = defaultdict[Any, list[Any]](list)
    for guard in shape_env.guards:
        if len(guard.expr.free_symbols) == 1:
            of_symbol[next(iter(guard.expr.free_symbols))].append(guard.expr)
    for size in _symbols(module):
        guards = of_symbol.get(size.node.expr, [])
        if any(isinstance(g, sympy.Eq) for g in guards) and not _varies(size.node.expr, hint(size), guards):
            yield size


def _symbols(module: fx.GraphModule) -> Iterator[torch.SymInt]:
    found: dict[Any, torch.SymInt] = {}
    for node in module.graph.nodes:
        val = node.meta.get("val")
        if node.op == "placeholder" and isinstance(val, Tensor):
            for size in val.shape:
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    found.setdefault(size.node.expr, size)
    return iter(found.values())


def _varies(symbol: sympy.Symbol, at: int, guards: list[Any]) -> bool:
    sizes = (*_TRIED, *(at * k for k in _MULTIPLES))
    return any(all(_holds(g, symbol, n) for g in guards) for n in sizes if n != at)


def _holds(guard: Any, symbol: sympy.Symbol, size: int) -> bool:
    try:
        return bool(guard.subs(symbol, size) == sympy.true)
    except ZeroDivisionError:
        return False
