"""Where a slice of a tensor comes from: its index selection propagated backward, to the rows of the weights that make it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from torch import fx

from attnopt.graph.nodes import ancestors, arg, calls, is_number, is_state, shape, wrap
from attnopt.graph.ops import IN_ORDER, Kind, of
from attnopt.graph.select import Selection
from attnopt.slicing.pull import pull
from attnopt.slicing.selection import Pulled, trim


@dataclass(frozen=True)
class Source:
    """A slice source.  ``kind``: "weight" (of a projection), "constant" (another parameter or buffer, or numbers
    of sizes alone), "token" (the input of a projection), "input" (of the model), "part" (all of one of several joined
    tensors), "blocked" (no rule for ``node``).  ``path`` leads there, and ``ways`` has the nodes of all paths:
    a rotation or a norm reads the same features twice."""

    kind: str
    node: fx.Node
    selection: Selection
    path: tuple[fx.Node, ...]
    ways: tuple[fx.Node, ...] = ()


def slice_sources(node: fx.Node, selection: Selection, exact: bool = True) -> list[Source]:
    """The slice sources of a selection of ``node``: the ends of its backward propagation, each once.

    ``exact``: including slices along other axes, such as a role in a packed projection.
    """
    found: dict[tuple[fx.Node, str, tuple[tuple[int, tuple[int, ...]], ...]], Source] = {}
    for end in _ends(node, selection, exact):
        key = (end.node, end.kind, tuple(sorted((a, tuple(i)) for a, i in end.selection.items())))
        known = found.get(key, end)
        found[key] = replace(known, ways=tuple(dict.fromkeys((*known.ways, *end.path))))
    return list(found.values())


def _ends(
    n: fx.Node,
    selection: Selection,
    exact: bool,
    above: tuple[fx.Node, ...] = (),
    in_weight: bool = False,
    is_part: bool = False,
) -> Iterator[Source]:
    """The end of each way up from ``n``.  ``above``: the nodes passed so far; ``in_weight``: a projection reads ``n`` as its
    weight; ``is_part``: ``n`` is one of several tensors that are joined along a selected axis."""
    chosen, path = trim(n, selection), (*above, n)
    if not chosen and not in_weight and not (is_part and calls(n, _ARRANGES)):
        if is_part:
            yield Source("part", n, chosen, path)
        return
    if n.op == "get_attr" and not is_state(n):
        yield Source("weight" if in_weight else "constant", n, chosen, path)
        return
    if n.op == "placeholder" or is_state(n):
        yield Source("input", n, chosen, path)
        return
    pulled, left = _pulled(n, chosen) if chosen or is_part else (None, {})
    if pulled is None:
        yield Source("constant" if _is_computed(n) else "blocked", n, chosen, path)
        return
    if left and (rest := pull(n, left)) is not None and rest.across:
        yield Source("token", n, left, path)
    if pulled.across:
        yield Source("token", n, chosen, path)
        return
    is_part = is_part or _joined_along(n) in chosen
    for i, (below, demanded) in enumerate((pulled.exact if exact else None) or pulled.demands):
        yield from _ends(below, demanded, exact, path, in_weight or i in pulled.weights, is_part)


def _is_computed(node: fx.Node) -> bool:
    """From sizes alone, like positions."""
    return all(n.op == "call_function" for n in ancestors(node, stop=is_number))


# Operators that return the same elements in the same order, for any selection.  A permute returns others axis by axis.
_ARRANGES = IN_ORDER | of(Kind.EXPAND, Kind.REPEAT, Kind.SLICE, Kind.PIECE, Kind.JOIN)
_JOINS = of(Kind.JOIN)


def _joined_along(node: fx.Node) -> int | None:
    return wrap(arg(node, 1, 0), len(shape(node))) if calls(node, _JOINS) else None


def _pulled(node: fx.Node, selection: Selection) -> tuple[Pulled | None, Selection]:
    """The selection propagated backward, and the axes that could not be: mixed by a norm, or tokens beside features, which
    lead to weights, unlike tokens."""
    across: tuple[Pulled | None, Selection] = None, {}
    for size in range(len(selection), 0, -1) if selection else (0,):
        for axes in combinations(sorted(selection), size):
            pulled = pull(node, {a: selection[a] for a in axes})
            left = {a: i for a, i in selection.items() if a not in axes}
            if pulled is not None and not pulled.across:
                return pulled, left
            if pulled is not None and across[0] is None:
                across = pulled, left
    return across


def signature(node: fx.Node, selection: Selection) -> frozenset[object]:
    """Equal for two selections only if they select the same values for the same reason."""
    return frozenset(
        (x.kind, x.node, tuple(sorted(x.selection.items())), frozenset(n for n in x.ways if not calls(n, _ARRANGES)))
        for x in slice_sources(node, selection)
    )


def chooses_weights(node: fx.Node, one: Selection, other: Selection, behind: bool = False) -> bool:
    """The two selections differ along a feature axis of a projection, not along tokens or
    the batch: they come from different rows of a weight.  ``behind``: or of one above the first."""
    return weight_rows(node, one, behind) != weight_rows(node, other, behind)


def weight_rows(node: fx.Node, chosen: Selection, behind: bool = False) -> frozenset[object]:
    """The rows of weights that a selection comes from, as far as it chooses any."""
    return frozenset((n, tuple(sorted(rows.items()))) for n, rows in _rows(node, chosen, behind))


def _rows(node: fx.Node, chosen: Selection, behind: bool) -> Iterator[tuple[fx.Node, Selection]]:
    for x in slice_sources(node, chosen, exact=False):
        if x.kind == "weight":
            yield x.node, x.selection
        elif x.kind == "token" and behind and (pulled := pull(x.node, x.selection)) is not None:
            for above, demanded in pulled.demands:
                yield from _rows(above, demanded, behind=False)
