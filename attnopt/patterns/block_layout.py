"""Which key blocks each query block visits, computed without the dense mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnopt.base.intervals import Reach, clipped, merged, without

FULL_TILE = -1
_PAIRS = 1 << 22  # (query, key) pairs per evaluation


class Visible(Protocol):
    """The part of the interface of a pattern that layouts need; not per head."""

    def reach(self, first: int, last: int, kv_len: int) -> Reach: ...

    def visible_pairs(self, i: Tensor, j: Tensor) -> Tensor: ...

    def at_length(self, kv_len: int) -> Visible: ...


@dataclass(frozen=True, eq=False)
class Layout:
    """A pattern at fixed lengths, as compressed sparse rows of blocks.

    Block row r holds the queries ``r * block_q`` and on; its key blocks are ``cols[row_ptr[r]:row_ptr[r + 1]]``,
    ascending.  Entry e is fully visible if ``tile[e]`` is ``FULL_TILE``, otherwise its pairs are ``tiles[tile[e]]``.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    row_ptr: NDArray[np.int64]  # [rows + 1]
    cols: NDArray[np.int32]  # [entries]
    tile: NDArray[np.int32]  # [entries]
    tiles: NDArray[np.bool_]  # [distinct, block_q, block_kv]; False outside the lengths

    @property
    def num_rows(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def num_cols(self) -> int:
        return -(-self.kv_len // self.block_kv)

    @property
    def rows(self) -> NDArray[np.int32]:
        """The block row of each entry."""
        return np.repeat(np.arange(self.num_rows, dtype=np.int32), np.diff(self.row_ptr))

    @cached_property
    def visits(self) -> float:
        """The fraction of all pairs in visited blocks: what a kernel with these tiles computes."""
        if not self.q_len * self.kv_len:
            return 0.0
        tall = np.minimum(self.block_q, self.q_len - self.rows.astype(np.int64) * self.block_q)
        wide = np.minimum(self.block_kv, self.kv_len - self.cols.astype(np.int64) * self.block_kv)
        return float((tall * wide).sum() / (self.q_len * self.kv_len))


@lru_cache(maxsize=256)
def layout(pattern: Visible, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Layout:
    """The blocks of ``pattern`` (not per head); time and memory grow with the number of visited blocks."""
    rows, cols, tile = [], [], []
    shapes: dict[bytes, int] = {}
    full, looked_at = _block_ranges(pattern, q_len, kv_len, block_q, block_kv)
    for portion in _looked_at(pattern, looked_at, q_len, kv_len, block_q, block_kv):
        counts = portion.seen.sum((1, 2))
        kept, partly = counts > 0, (counts > 0) & (counts < portion.pairs)
        packed = np.packbits(portion.seen[partly].reshape(-1, block_q * block_kv), axis=1)
        marks = np.full(len(counts), FULL_TILE, np.int32)
        marks[partly] = [shapes.setdefault(bits.tobytes(), len(shapes)) for bits in packed]
        rows.append(portion.row[kept])
        cols.append(portion.col[kept])
        tile.append(marks[kept])
    row, col = _each_block(full)
    return _sorted(
        q_len, kv_len, block_q, block_kv, [*rows, row], [*cols, col], [*tile, np.full(len(row), FULL_TILE)], shapes
    )


@lru_cache(maxsize=256)
def count(pattern: Visible, q_len: int, kv_len: int, block: int = 64) -> int:
    """The exact number of visible pairs of ``pattern`` (not per head)."""
    full, looked_at = _block_ranges(pattern, q_len, kv_len, block, block)
    portions = _looked_at(pattern, looked_at, q_len, kv_len, block, block)
    seen = sum(int(np.count_nonzero(portion.seen)) for portion in portions)
    tall = np.minimum((full[:, 0] + 1) * block, q_len) - full[:, 0] * block
    wide = np.minimum(full[:, 2] * block, kv_len) - full[:, 1] * block
    return seen + int((tall * wide).sum())


@lru_cache(maxsize=256)
def count_blind(pattern: Visible, q_len: int, kv_len: int, block: int = 64) -> int:
    """The exact number of fully masked queries of ``pattern`` (not per head)."""
    full, looked_at = _block_ranges(pattern, q_len, kv_len, block, block)
    sees = np.zeros((-(-q_len // block), block), np.bool_)
    sees[full[:, 0]] = True
    for portion in _looked_at(pattern, looked_at, q_len, kv_len, block, block):
        np.logical_or.at(sees, portion.row, portion.seen.any(2))
    return int(np.count_nonzero(~sees.reshape(-1)[:q_len]))


def _sorted(
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    rows: list[NDArray[np.int64]],
    cols: list[NDArray[np.int64]],
    tile: list[NDArray[np.int32]],
    shapes: dict[bytes, int],
) -> Layout:
    row, col, mark = (np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64) for parts in (rows, cols, tile))
    order = np.lexsort((col, row))
    counts = np.bincount(row, minlength=-(-q_len // block_q))
    tiles = np.frombuffer(b"".join(shapes), np.uint8).reshape(len(shapes), -(-block_q * block_kv // 8))
    return Layout(
        q_len,
        kv_len,
        block_q,
        block_kv,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        col[order].astype(np.int32),
        mark[order].astype(np.int32),
        np.unpackbits(tiles, axis=1, count=block_q * block_kv).astype(bool).reshape(-1, block_q, block_kv),
    )


@dataclass(frozen=True, eq=False)
class _Portion:
    """Some evaluated blocks."""

    row: NDArray[np.int64]  # [n]
    col: NDArray[np.int64]  # [n]
    seen: NDArray[np.bool_]  # the visible pairs [n, block_q, block_kv]; False outside the lengths
    pairs: NDArray[np.int64]  # [n]: number of pairs within the lengths


def _block_ranges(
    pattern: Visible, q_len: int, kv_len: int, block_q: int, block_kv: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Block row, first key block and the one after the last: fully visible ranges, and ranges to evaluate."""
    offset = kv_len - q_len
    last_block = -(-kv_len // block_kv)
    whole: list[tuple[int, int, int]] = []
    looked_at: list[tuple[int, int, int]] = []
    for row in range(-(-q_len // block_q)):
        first, last = row * block_q + offset, min((row + 1) * block_q, q_len) - 1 + offset
        reach = pattern.reach(first, last, kv_len)
        sure = clipped(reach.all, kv_len)
        full = merged([(-(-a // block_kv), last_block if b == kv_len else b // block_kv) for a, b in sure])
        some = merged([(a // block_kv, -(-b // block_kv)) for a, b in clipped(reach.some, kv_len)])
        whole += [(row, a, b) for a, b in full]
        looked_at += [(row, a, b) for a, b in without(some, full)]
    return tuple(np.asarray(found, np.int64).reshape(-1, 3) for found in (whole, looked_at))  # type: ignore[return-value]


def _each_block(ranges: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of every block of the ranges."""
    row, start, stop = ranges.T
    counts = stop - start
    before = np.cumsum(counts) - counts
    return np.repeat(row, counts), np.arange(counts.sum()) - np.repeat(before - start, counts)


def _looked_at(
    pattern: Visible, ranges: NDArray[np.int64], q_len: int, kv_len: int, block_q: int, block_kv: int
) -> Iterator[_Portion]:
    rows, cols = _each_block(ranges)
    size = max(1, _PAIRS // (block_q * block_kv))
    known = pattern.at_length(kv_len)
    for begin in range(0, len(rows), size):
        row, col = rows[begin : begin + size], cols[begin : begin + size]
        with _disable_current_modes(), torch.device("cpu"):
            query = (torch.from_numpy(row)[:, None] * block_q + torch.arange(block_q)).unsqueeze(2)
            key = (torch.from_numpy(col)[:, None] * block_kv + torch.arange(block_kv)).unsqueeze(1)
            i, j = query.clamp(max=q_len - 1) + (kv_len - q_len), key.clamp(max=kv_len - 1)
            seen = known.visible_pairs(i, j)
            if q_len % block_q:
                seen = seen & (query < q_len)
            if kv_len % block_kv:
                seen = seen & (key < kv_len)
            found = seen.numpy()
        tall = np.minimum(block_q, q_len - row * block_q)
        wide = np.minimum(block_kv, kv_len - col * block_kv)
        yield _Portion(row, col, found, tall * wide)
