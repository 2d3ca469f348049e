"""Whether a tensor holds the same at every index of an axis, such as a batch over which learned queries are repeated."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from attnopt.base.sizes import is_static
from attnopt.graph.nodes import arg, calls, is_tensor, shape, value
from attnopt.graph.ops import Operators, named
from attnopt.graph.select import Selection
from attnopt.slicing.pull import pull
from attnopt.slicing.selection import Demand, aligned, trim

_FULL, _FILLED = named("full"), named("full zeros ones")


def repeats(node: fx.Node, axis: int, settled: Collection[fx.Node], attentions: Operators) -> bool:
    """What is selected by one index of ``axis`` comes, for every index alike, from ``settled`` nodes, whose values never differ.
    ``attentions``: operators on [B, heads, length, features].

    The first index is followed upward: where it is dropped, at an ``expand`` or ``repeat``, any other would be, too.
    """
    pending, seen = [(node, trim(node, {axis: (0,)}))], set[object]()
    while pending:
        n, chosen = pending.pop()
        if (n, tuple(chosen.items())) in seen or (not chosen and n in settled) or _is_filled(n):
            continue
        seen.add((n, tuple(chosen.items())))
        demands = _demands(n, chosen, attentions) if chosen else None
        if demands is None:
            return False
        for above, demanded in demands:
            if not all(_holds_at_any_size(above, a, idx) for a, idx in demanded.items()):
                return False
            pending.append((above, trim(above, demanded)))
    return True


def _is_filled(n: fx.Node) -> bool:
    return calls(n, _FILLED) and not (calls(n, _FULL) and isinstance(arg(n, 1), fx.Node))


def _demands(n: fx.Node, chosen: Selection, attentions: Operators) -> tuple[Demand, ...] | None:
    if calls(n, attentions):
        return _of_attention(n, chosen)
    pulled = pull(n, chosen)
    return None if pulled is None else pulled.demands


def _of_attention(n: fx.Node, chosen: Selection) -> tuple[Demand, ...] | None:
    """Of the sequences that are chosen."""
    given = [x for x in n.all_input_nodes if is_tensor(x)]
    if set(chosen) != {0} or len(shape(n)) != 4 or any(len(shape(x)) != 4 for x in given):
        return None
    return tuple((x, aligned(x, 4, chosen)) for x in given)


def _holds_at_any_size(node: fx.Node, axis: int, chosen: tuple[int, ...]) -> bool:
    """An axis of free length may join the batch and another: its first places then belong to the first sequence at any length,
    or the first place of each group does."""
    size = shape(node)[axis]
    first_of_each = tuple(range(0, size, max(1, size // len(chosen))))
    return is_static(value(node).shape[axis]) or chosen in (tuple(range(len(chosen))), first_of_each)
