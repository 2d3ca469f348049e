"""How much a rank holds at once of the tensors that a call makes, from the life of each in the graph."""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor, fx

from attnopt.distributed.layout import Layout
from attnopt.distributed.placement import Form

Storage = tuple[int, bool]  # an allocation, views of which share it; whether of all tokens


def peak_bytes(layout: Layout) -> int:
    """The most that the rank with the most tokens holds at once in one forward pass without gradients: inputs, activations, and
    what is on its way, but no parameters, and no scratch memory of operators."""
    lives: dict[Storage, list[int]] = {}
    bytes_of: dict[Storage, int] = {}
    beside: dict[int, int] = {}
    placement = layout.placement
    for step, node in enumerate(layout.gm.graph.nodes):
        if node in layout.ways:
            beside[step] = layout.ways[node].workspace(placement.cores[node].sizes(layout.values))
        for form in placement.forms(node):
            moved = _made(layout, node, form, bytes_of)
            read = [s for n, of_n in placement.wanted[node][form].items() for s in _storages(layout, n, of_n)]
            for storage in (*moved, *read):
                lives.setdefault(storage, []).append(step)
        if node.op == "output":
            for n, form in layout.forms.items():
                for storage in _storages(layout, n, form):
                    lives.setdefault(storage, []).append(step)
    changes = [0] * (len(layout.gm.graph.nodes) + 1)
    for storage, steps in lives.items():
        changes[min(steps)] += bytes_of.get(storage, 0)
        changes[max(steps) + 1] -= bytes_of.get(storage, 0)
    return max(held + beside.get(step, 0) for step, held in enumerate(accumulate(changes)))


def _made(layout: Layout, node: fx.Node, form: Form, bytes_of: dict[Storage, int]) -> list[Storage]:
    """The storages of a value, whose bytes are noted unless it is a parameter or a view of something before it."""
    found = _storages(layout, node, form)
    for storage, x in zip(found, _tensors(layout, node), strict=True):
        whole = 0 if node.op == "get_attr" else x.untyped_storage().nbytes()
        shards = layout.shards
        bytes_of.setdefault(storage, whole if form is None else whole // shards.length * shards.longest)
    return found


def _storages(layout: Layout, node: fx.Node, form: Form) -> list[Storage]:
    return [(x.untyped_storage()._cdata, form is None) for x in _tensors(layout, node)]


def _tensors(layout: Layout, node: fx.Node) -> list[Tensor]:
    x = layout.values.get(node)
    return [t for t in (x if isinstance(x, (tuple, list)) else [x]) if isinstance(t, Tensor)]
