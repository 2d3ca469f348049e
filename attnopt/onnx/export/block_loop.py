"""Attention one block of queries at a time, each with only its visible keys: time linear in the number of kept pairs.

A loop keeps the scores of one block in the CPU cache, needs no padding, and supports any length and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from attnopt.onnx.export.builder import Builder
from attnopt.onnx.export.choose_form import OnnxSite, hull
from attnopt.onnx.export.fused_ops import attention
from attnopt.onnx.export.values import Values
from attnopt.patterns.bands import Band
from attnopt.patterns.block_layout import FULL_TILE


@dataclass(frozen=True)
class _Rows:
    """The queries of one iteration: rows ``start`` to ``stop``, at positions ``first`` to ``last`` (exclusive); 1-D numbers."""

    turn: ir.Value
    start: ir.Value
    stop: ir.Value
    first: ir.Value
    last: ir.Value


@dataclass(frozen=True)
class _Keys:
    """How to slice the keys of one iteration from an axis, and which are visible: bool [rows, keys] or None for all."""

    take: Callable[[ir.Value, int], ir.Value]
    visible: ir.Value | None


def blocks(b: Builder, site: OnnxSite, x: Values, block: int) -> ir.Value:
    """Keys in bands around the queries, or at the beginning; lengths may be dynamic."""
    found = site.spec.pattern.bands
    assert found is not None
    return _loop(b, site, x, block, lambda body, rows: _keys_of_bands(body, site, x, found, rows, block))


def gathered(b: Builder, site: OnnxSite, x: Values, block: int) -> ir.Value:
    """Any keys, gathered by lists that are constants of the model; both lengths are fixed."""
    lists = _lists(site, block)
    return _loop(b, site, x, block, lambda body, rows: _keys_of_lists(body, lists, rows))


def _loop(b: Builder, site: OnnxSite, x: Values, block: int, keys_of: Callable[[Builder, _Rows], _Keys]) -> ir.Value:
    length = b.size(x.q, x.axis)
    offset = None if site.is_square else b.op("Sub", b.size(x.k, x.axis), length)
    turns = b.op("Div", b.op("Add", length, b.ints(block - 1)), b.ints(block))
    body = b.body()
    turn, going, done = (ir.Value(name=body.name(role)) for role in ("turn", "going", "done"))
    turn.type, turn.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
    going.type, going.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    done.type = ir.SequenceType(ir.TensorType(_element(site)))
    start = body.op("Unsqueeze", body.op("Mul", turn, b.number(block)), b.ints(0))
    stop = body.op("Min", body.op("Add", start, b.ints(block)), length)
    first, last = (n if offset is None else body.op("Add", n, offset) for n in (start, stop))
    rows = _Rows(turn, start, stop, first, last)
    part, is_full = _part(body, x, rows, keys_of(body, rows))
    made = body.op("SequenceInsert", done, attention(body, site, part, is_full))
    made.type = done.type
    goes_on = body.op("Identity", going)
    goes_on.type, goes_on.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    inner = ir.Graph([turn, going, done], [goes_on, made], nodes=body.nodes, name=body.prefix)
    nothing = b.op("SequenceEmpty", dtype=_element(site))
    always = b.constant(np.asarray(True))
    every = b.op("Loop", b.op("Squeeze", turns), always, nothing, body=inner)
    return b.op("ConcatFromSequence", every, axis=x.axis)


def _part(b: Builder, x: Values, rows: _Rows, keys: _Keys) -> tuple[Values, bool]:
    """The operands of one iteration, and whether their mask is known to have both lengths."""

    def of_rows(value: ir.Value, axis: int) -> ir.Value:
        return value if is_one(value, axis) else b.slice(value, rows.start, rows.stop, axis)

    def of_pairs(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        rows_of = of_rows(value, 2)
        return rows_of if is_one(value, 3) else keys.take(rows_of, 3)

    mask, bias = of_pairs(x.mask), of_pairs(x.bias)
    if keys.visible is not None:
        mask = keys.visible if mask is None else b.op("And", keys.visible, mask)
    part = replace(
        x,
        q=of_rows(x.q, x.axis),
        k=keys.take(x.k, x.axis),
        v=keys.take(x.v, x.axis),
        bias=bias,
        mask=mask,
        sinks=None if x.sinks is None else of_rows(x.sinks, 2),
    )
    return part, keys.visible is not None


# ---------------------------------------------------------------- keys in bands
def _keys_of_bands(b: Builder, site: OnnxSite, x: Values, found: Sequence[Band], rows: _Rows, block: int) -> _Keys:
    low, high = hull(found)
    total = b.size(x.k, x.axis)
    start, stop = b.ints(0), total
    if low is not None:
        start = b.op("Max", _shifted(b, rows.first, low), b.ints(0))
    if high is not None:
        stop = b.op("Min", _shifted(b, rows.last, high), total)
    if not site.is_square:  # queries before the first key: one hidden key instead of none
        start = b.op("Min", start, b.op("Sub", total, b.ints(1)))
        stop = b.op("Max", stop, b.op("Add", start, b.ints(1)))
    if found == (Band(),):
        return _Keys(lambda value, axis: value, None)
    if low is None and high is None:
        return _Keys(lambda value, axis: value, _seen(b, found, rows, b.ints(0), total))
    leads = [band for band in found if band.first is not None]
    inside = _inside(b, site, found, rows, start, stop, block)
    if low is None or not leads:
        return _Keys(lambda value, axis: b.slice(value, start, stop, axis), inside)
    most = max(band.first for band in leads if band.first is not None)
    before = b.op("Min", start, b.ints(most))

    def take(value: ir.Value, axis: int) -> ir.Value:
        ahead = b.slice(value, b.ints(0), before, axis)
        return b.op("Concat", ahead, b.slice(value, start, stop, axis), axis=axis)

    return _Keys(take, b.op("Concat", _seen(b, leads, rows, b.ints(0), before), inside, axis=1))


def _shifted(b: Builder, number: ir.Value, by: int) -> ir.Value:
    return number if by == 0 else b.op("Add", number, b.ints(by))


def _inside(
    b: Builder, site: OnnxSite, found: Sequence[Band], rows: _Rows, start: ir.Value, stop: ir.Value, block: int
) -> ir.Value:
    """Visibility of keys ``start`` to ``stop``: sliced from one constant if the whole reach is known."""
    low, high = hull(found)
    if low is None or high is None or not site.is_square or any(band.first is not None for band in found):
        return _seen(b, found, rows, start, stop)
    ahead = np.arange(low, high + block)[None] - np.arange(block)[:, None]
    table = np.zeros(ahead.shape, bool)
    for band in found:
        assert band.low is not None
        assert band.high is not None
        table |= (ahead >= band.low) & (ahead <= band.high) & (ahead % band.step == 0)
    reach = _shifted(b, rows.first, low)
    corner = b.op("Concat", b.ints(0), b.op("Sub", start, reach), axis=0)
    end = b.op("Concat", b.op("Sub", rows.stop, rows.start), b.op("Sub", stop, reach), axis=0)
    return b.op("Slice", b.constant(table), corner, end)


def _seen(b: Builder, found: Sequence[Band], rows: _Rows, start: ir.Value, stop: ir.Value) -> ir.Value:
    """Bool [rows, keys] of the keys ``start`` to ``stop``."""
    keys = b.arange(start, stop)
    ahead = b.op("Sub", keys, b.op("Unsqueeze", b.arange(rows.first, rows.last), b.ints(1)))
    return reduce(lambda p, q: b.op("Or", p, q), (_seen_in(b, band, keys, ahead) for band in found))


def _seen_in(b: Builder, band: Band, keys: ir.Value, ahead: ir.Value) -> ir.Value:
    conditions = []
    if band.low is not None:
        conditions.append(b.op("GreaterOrEqual", ahead, b.number(band.low)))
    if band.high is not None:
        conditions.append(b.op("LessOrEqual", ahead, b.number(band.high)))
    if band.step != 1:
        conditions.append(b.op("Equal", b.op("Mod", ahead, b.number(band.step)), b.number(0)))
    if band.first is not None:
        near = b.op("Less", keys, b.number(band.first))
        conditions.append(b.op("Expand", near, b.op("Shape", ahead)))
    return reduce(lambda p, q: b.op("And", p, q), conditions)


# ---------------------------------------------------------------- keys in lists
@dataclass(frozen=True)
class _Lists:
    """The concatenated keys of all iterations, and their visible pairs: from ``key_ptr[r]`` and ``pair_ptr[r]`` on."""

    keys: NDArray[np.int64]
    key_ptr: NDArray[np.int64]
    pairs: NDArray[np.bool_] | None  # None if every listed key is visible to its whole block
    pair_ptr: NDArray[np.int64]


def _lists(site: OnnxSite, block: int) -> _Lists:
    layout = site.spec.pattern.layout(site.q_len, site.kv_len, block, block)
    keys: list[NDArray[np.int64]] = []
    pairs: list[NDArray[np.bool_]] = []
    stored: dict[bytes, int] = {}
    pair_ptr: list[int] = []
    size = 0
    for row in range(layout.num_rows):
        tall = min(block, site.q_len - row * block)
        seen = np.zeros((tall, 0), bool)
        at = np.zeros(0, np.int64)
        for entry in range(layout.row_ptr[row], layout.row_ptr[row + 1]):
            col, tile = int(layout.cols[entry]) * block, int(layout.tile[entry])
            wide = min(block, site.kv_len - col)
            tile_seen = np.ones((tall, wide), bool) if tile == FULL_TILE else layout.tiles[tile][:tall, :wide]
            kept = tile_seen.any(0)
            seen = np.concatenate([seen, tile_seen[:, kept]], 1)
            at = np.concatenate([at, col + np.flatnonzero(kept)])
        if not len(at):  # no visible key, but the operator needs one
            seen, at = np.zeros((tall, 1), bool), np.zeros(1, np.int64)
        keys.append(at)
        packed = seen.tobytes() + bytes(str(seen.shape), "ascii")
        if packed not in stored:
            stored[packed] = size
            pairs.append(seen.reshape(-1))
            size += seen.size
        pair_ptr.append(stored[packed])
    flat = np.concatenate(pairs)
    key_ptr = np.concatenate([[0], np.cumsum([len(at) for at in keys])])
    return _Lists(np.concatenate(keys), key_ptr, None if flat.all() else flat, np.asarray(pair_ptr, np.int64))


def _keys_of_lists(b: Builder, lists: _Lists, rows: _Rows) -> _Keys:
    pointers = b.constant(np.stack([lists.key_ptr[:-1], lists.key_ptr[1:], lists.pair_ptr], 1).astype(np.int64))
    start, stop, pair = (
        b.op("Slice", b.op("Gather", pointers, rows.turn, axis=0), b.ints(i), b.ints(i + 1)) for i in range(3)
    )
    keys = b.op("Slice", b.constant(lists.keys), start, stop)
    visible = None
    if lists.pairs is not None:
        shape = b.op("Concat", b.op("Sub", rows.stop, rows.start), b.op("Sub", stop, start), axis=0)
        end = b.op("Add", pair, b.op("ReduceProd", shape, keepdims=1))
        visible = b.op("Reshape", b.op("Slice", b.constant(lists.pairs), pair, end), shape)
    return _Keys(lambda value, axis: b.op("Gather", value, keys, axis=axis), visible)


def is_one(value: ir.Value, axis: int) -> bool:
    """The axis is there to be broadcast."""
    return value.shape is not None and value.shape[axis] == 1


def _element(site: OnnxSite) -> ir.DataType:
    return ir.DataType.DOUBLE if site.dtype == torch.float64 else ir.DataType.FLOAT
