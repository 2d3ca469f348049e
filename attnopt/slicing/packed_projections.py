"""Packed projections: tensors projected together for several roles of an attention, and the nodes of each role."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, permutations

from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import ancestors, between, calls, is_tensor
from attnopt.slicing.selector import PIECES, Selector, with_splits
from attnopt.slicing.weight_store import Weights


def forks(operands: Mapping[str, fx.Node], ways: Mapping[str, Sequence[fx.Node]]) -> set[fx.Node]:
    """Of the nodes between one role and its weights (``ways``), those that another role also depends on."""
    above = {role: set(ancestors(node)) for role, node in operands.items()}
    return {n for one, other in permutations(operands, 2) for n in above[other].intersection(ways[one])}


def built_anew(
    forked: set[fx.Node], operands: Mapping[str, fx.Node], ways: Mapping[str, Sequence[fx.Node]]
) -> list[fx.Node]:
    """The nodes to recompute for each role, so that none needs a packed tensor: also values between it and an operand, such as
    the length that a norm divides by."""
    packed = [n for n in forked if n.op == "call_function"]
    return [*chain(*ways.values()), *between(packed, operands.values())]


def is_read_in_parts(packed: Iterable[fx.Node]) -> bool:
    """Nothing reads ``packed`` tensors whole."""
    return all(calls(n, PIECES) for n in _readers(packed))


def take_apart(packed: Collection[fx.Node], weights: Weights) -> dict[fx.Node, fx.Node]:
    """Let whatever reads a part of ``packed`` tensors read a projection of its own, unless something reads them whole: the
    parts, and what takes their places."""
    if not is_read_in_parts(packed):
        return {}
    made = {}
    for part in _readers(packed):
        select = Selector(Emitter(part.graph, part, part.meta.get("attnopt")), weights, {}, [part], packed)
        made[part] = select.select(part, {})
        part.replace_all_uses_with(made[part])
    return made


def _readers(packed: Iterable[fx.Node]) -> list[fx.Node]:
    made = with_splits(n for n in packed if n.op == "call_function")
    return [u for n in sorted(made) for u in n.users if u not in made and is_tensor(u)]  # the others read sizes
