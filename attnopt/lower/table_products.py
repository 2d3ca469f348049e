"""Products with rows of a table that an index chooses for each pair: the table is multiplied first, then products are chosen.

    sum_d x[.., i, d] table[index[i, j], d]  =  y[.., i, index[i, j]]  with  y[.., i, r] = sum_d x[.., i, d] table[r, d]

Relative positions are often written as on the left (arXiv:1803.02155), with a tensor of L x S x D chosen rows.  Where the index
depends on j - i alone, nothing has to be chosen at all: with one row for each distance, in their order, the products
of a query lie one place before those of the query above it (skewing, arXiv:1809.04281).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.graph.axes import Axes, Axis, length, resolve_all, unfollow
from attnopt.graph.emitter import Emitter
from attnopt.graph.evaluate import inputs_behind, is_heavy, is_plain
from attnopt.graph.nodes import RESHAPES, ancestors, arg, aten, calls, dtype, is_call, is_tensor, operand, shape, wrap
from attnopt.graph.ops import FACTORS, named
from attnopt.graph.products import Product, product_of
from attnopt.match.mask_patterns import Sample, samples

_LOOKUPS = named("index.Tensor index_select embedding")
_PICK = 40  # the time to pick one product, in multiplications; measured on Zen 4, one thread
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class _Chosen:
    """The rows ``table[.., index, ..]``, which ``index`` [.., ..] chooses along the axis ``at``; ``axes`` of the result."""

    table: fx.Node
    at: int
    index: fx.Node
    axes: Axes

    @property
    def index_axes(self) -> Axes:
        return self.axes[self.at : self.at + len(shape(self.index))]

    @property
    def table_axes(self) -> Axes:
        """() for the axis of the choice."""
        return (*self.axes[: self.at], (), *self.axes[self.at + len(shape(self.index)) :])


@dataclass(frozen=True)
class _TableProduct:
    """``node`` sums ``x`` times chosen rows over ``features``: an index [.., queries, ..] has one axis, ``keys``, that ``x``
    lacks."""

    node: fx.Node
    axes: Axes
    x: fx.Node
    x_axes: Axes
    rows: _Chosen
    features: Axis
    queries: Axis
    keys: Axis

    @property
    def others(self) -> list[int]:
        """The axes of ``x`` beside queries and features."""
        return [i for i, axis in enumerate(self.x_axes) if axis not in (self.queries, self.features)]

    @property
    def made(self) -> Axes:
        return (*(self.x_axes[i] for i in self.others), self.queries, self.keys)


def multiply_tables_first(gm: fx.GraphModule, bias: fx.Node) -> None:
    """Rewrite, in place, the products with chosen rows that ``bias`` consists of, where that needs fewer numbers."""
    stop = {n for n in ancestors(bias, stop=_is_product) if _is_product(n)}
    for node in sorted(stop):
        found = _table_product(node)
        if found is None:
            continue
        by_distance = _skews_faster(found) and _is_by_distance(gm, found)
        if not _saves(found, by_distance):
            continue
        emit = Emitter(gm.graph, node, dict(bias.meta.get("attnopt", {})))
        pairs = _skewed(emit, found) if by_distance else _picked(emit, found)
        node.replace_all_uses_with(_as_before(emit, found, pairs))


def _is_product(node: fx.Node) -> bool:
    return is_heavy(node) or product_of(node) is not None


def _table_product(node: fx.Node) -> _TableProduct | None:
    product = product_of(node)
    if product is None or product.addend is not None or product.alpha != 1.0:
        return None
    sides = (_of_sides(p) for p in (product, product.swapped()))
    return next((found for found in sides if found is not None), None)


def _of_sides(p: Product) -> _TableProduct | None:
    """The right operand holds the rows."""
    rows = _chosen(p.right, p.right_axes)
    if rows is None or dtype(rows.table) != dtype(p.left):
        return None
    axes, x_axes = resolve_all(p.axes), resolve_all(p.left_axes)
    kept = {atom for axis in axes for atom in axis}
    features = [axis for axis in rows.table_axes if axis and not kept & set(axis)]
    new = [axis for axis in rows.index_axes if axis not in x_axes]
    shared = [axis for axis in rows.index_axes if axis in x_axes]
    batch = [axis for axis in rows.table_axes if axis and axis not in features]
    if len(features) != 1 or len(new) != 1 or not shared or () in rows.index_axes:
        return None
    summed = [axis for axis in x_axes if axis and not kept & set(axis)]
    if summed != features or any(axis not in x_axes for axis in batch):
        return None
    found = _TableProduct(p.node, axes, p.left, x_axes, rows, features[0], shared[-1], new[0])
    is_whole = sorted(map(_name, filter(None, found.made))) == sorted(map(_name, filter(None, axes)))
    return found if is_whole else None


def _name(axis: Axis) -> tuple[int, ...]:
    return tuple(map(id, axis))


def _chosen(node: fx.Node, axes: Axes) -> _Chosen | None:
    """The lookup above ``node``, which has ``axes``, behind layouts."""
    while not calls(node, _LOOKUPS):
        above = None if calls(node, FACTORS) else unfollow(node, axes)
        if above is None:
            return None
        node, axes = above
    axes = resolve_all(axes)
    if is_call(node, aten.embedding.default):
        table, at, index = operand(node), 0, operand(node, 1)
    elif is_call(node, aten.index.Tensor):
        given = [(i, x) for i, x in enumerate(arg(node, 1)) if x is not None]
        if len(given) != 1:
            return None
        ((at, index),), table = given, operand(node)
    else:
        table, index = operand(node), operand(node, 2)
        at = wrap(arg(node, 1), len(shape(table)))
    if not is_tensor(index) or dtype(index) not in _INTEGERS:
        return None
    if len(shape(index)) == 1 and len(axes[at]) == 2 and calls(index, RESHAPES):  # it was laid out in one row
        first, second = ((atom,) for atom in axes[at])
        if shape(operand(index)) == (length(first), length(second)):
            index, axes = operand(index), (*axes[:at], first, second, *axes[at + 1 :])
    return _Chosen(table, at, index, axes) if len(shape(index)) >= 2 else None


def _saves(p: _TableProduct, by_distance: bool) -> bool:
    """The products with all rows are fewer numbers than the chosen rows, which are not made any more."""
    rows = math.prod(map(length, p.rows.axes))
    more = length(p.queries) if by_distance else shape(p.rows.table)[p.rows.at]
    return math.prod(length(p.x_axes[i]) for i in p.others) * length(p.queries) * more <= rows


def _skews_faster(p: _TableProduct) -> bool:
    """One row for each distance takes less time than all rows of the table, from which the products are then picked."""
    queries, keys, features = (length(axis) for axis in (p.queries, p.keys, p.features))
    return (queries + keys) * features <= shape(p.rows.table)[p.rows.at] * features + _PICK * keys


def _is_by_distance(gm: fx.GraphModule, p: _TableProduct) -> bool:
    """The index is the same for all pairs of queries and keys that lie equally far apart, at every size."""
    index = p.rows.index
    if len(shape(index)) != 2 or inputs_behind(index) or not is_plain(index):
        return False
    seen = samples(gm, [index])
    return bool(seen) and all(map(_has_one_by_distance, seen or ()))


def _has_one_by_distance(sample: Sample) -> bool:
    values = sample.values[0].expand(len(sample.rows), len(sample.columns))
    steps = sample.columns[None, :] - sample.rows[:, None]
    steps = steps - steps.min()
    of_step = torch.zeros(int(steps.max()) + 1, dtype=values.dtype)
    of_step[steps.flatten()] = values.flatten()
    return bool((of_step[steps] == values).all())


def _products(emit: Emitter, p: _TableProduct, table: fx.Node) -> fx.Node:
    """[.., queries, rows]: ``x``, its other axes first, times all rows of ``table``."""
    features, queries = (p.x_axes.index(axis) for axis in (p.features, p.queries))
    x = _permuted(emit, p.x, [*p.others, queries, features])
    axes = p.rows.table_axes
    batch = [axis for i in p.others if (axis := p.x_axes[i]) and axis in axes]
    by = _permuted(emit, table, [*map(axes.index, batch), axes.index(p.features), p.rows.at])
    for place, i in enumerate(p.others if batch else ()):
        if p.x_axes[i] not in batch:
            by = emit.call(aten.unsqueeze.default, by, place)
    return emit.call(aten.matmul.default, x, by)


def _skewed(emit: Emitter, p: _TableProduct) -> fx.Node:
    """[.., queries, keys]: one row of the table for each distance, and one more, so that rows of products are longer than those
    of keys."""
    index = p.rows.index if p.rows.index_axes[0] == p.queries else emit.call(aten.permute.default, p.rows.index, [1, 0])
    before = emit.call(aten.flip.default, emit.call(aten.select.int, index, 1, 0), [0])
    first = emit.call(aten.select.int, index, 0, 0)
    after = emit.call(aten.slice.Tensor, first, 0, 1, 2**63 - 1)
    distances = emit.call(aten.cat.default, [before, after, emit.call(aten.slice.Tensor, first, 0, 0, 1)])
    rows = emit.call(aten.index.Tensor, p.rows.table, [*(None for _ in range(p.rows.at)), distances])
    y = _products(emit, p, rows)
    last = len(shape(y)) - 1
    lead = [emit.size(y, axis) for axis in range(last - 1)]
    queries, keys = emit.size(index, 0), emit.size(index, 1)
    flat = emit.call(aten.reshape.default, y, [*lead, -1])
    start = emit.call(operator.sub, queries, 1) if isinstance(queries, fx.Node) else queries - 1
    flat = emit.call(aten.slice.Tensor, flat, last - 1, start, -1)
    shifted = emit.call(aten.reshape.default, flat, [*lead, queries, -1])
    return emit.call(aten.slice.Tensor, shifted, last, 0, keys)


def _picked(emit: Emitter, p: _TableProduct) -> fx.Node:
    """[.., queries, keys]"""
    y, index = _products(emit, p, p.rows.table), p.rows.index
    shared = [axis for axis in p.made if axis in p.rows.index_axes]
    index = _permuted(emit, index, [p.rows.index_axes.index(axis) for axis in shared])
    if dtype(index) != torch.int64:
        index = emit.call(aten._to_copy.default, index, dtype=torch.int64)
    is_negative = emit.call(aten.lt.Scalar, index, 0)  # counted from the end
    from_end = emit.call(aten.add.Tensor, index, emit.size(p.rows.table, p.rows.at))
    index = emit.call(aten.where.self, is_negative, from_end, index)
    for place, axis in enumerate(p.made):
        if axis not in shared:
            index = emit.call(aten.unsqueeze.default, index, place)
    last = len(p.made) - 1
    sizes = [*(emit.size(y, axis) for axis in range(last)), -1]
    return emit.call(aten.gather.default, y, last, emit.call(aten.expand.default, index, sizes))


def _as_before(emit: Emitter, p: _TableProduct, pairs: fx.Node) -> fx.Node:
    """``pairs`` with the axes of the product that it replaces."""
    full = [p.made.index(axis) for axis in p.axes if axis]
    if full == list(range(len(p.made))) == list(range(len(p.axes))):
        return pairs
    sizes = [emit.size(pairs, p.made.index(axis)) if axis else 1 for axis in p.axes]
    empty = [i for i, axis in enumerate(p.made) if not axis]
    return emit.call(aten.reshape.default, _permuted(emit, pairs, [*full, *empty]), sizes)


def _permuted(emit: Emitter, node: fx.Node, order: list[int]) -> fx.Node:
    return node if order == sorted(order) else emit.call(aten.permute.default, node, order)
