"""Which blocks of keys each block of queries visits, worked out without ever making the dense mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import _disable_current_modes

from attnopt.ranges import Ranges, clipped, without

if TYPE_CHECKING:
    from attnopt.pattern import Pattern

FULL_TILE = -1
_PAIRS = 1 << 22  # pairs of a query and a key that are looked at in one go


@dataclass(frozen=True, eq=False)
class Layout:
    """A pattern at fixed lengths, as compressed sparse rows of blocks.

    Block row r holds the queries ``r * block_q`` and on; its key blocks are ``cols[row_ptr[r]:row_ptr[r + 1]]``,
    ascending.  Entry e is entirely visible where ``tile[e]`` is ``FULL_TILE``, else its pairs are ``tiles[tile[e]]``.
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
        """The share of all pairs that lie in a visited block: what a kernel with these tiles computes."""
        if not self.q_len * self.kv_len:
            return 0.0
        tall = np.minimum(self.block_q, self.q_len - self.rows.astype(np.int64) * self.block_q)
        wide = np.minimum(self.block_kv, self.kv_len - self.cols.astype(np.int64) * self.block_kv)
        return float((tall * wide).sum() / (self.q_len * self.kv_len))


@lru_cache(maxsize=256)
def layout(pattern: Pattern, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Layout:
    """The blocks of ``pattern`` (one that is not per head); time and memory grow with the blocks that are kept."""
    rows, cols, tile = [], [], []
    shapes: dict[bytes, int] = {}
    for open_rows, open_cols, seen, inside in _open_blocks(pattern, q_len, kv_len, block_q, block_kv):
        kept = seen.any((1, 2))
        full = (seen == inside).all((1, 2))
        packed = np.packbits(seen[kept & ~full].reshape(-1, block_q * block_kv), axis=1)
        marks = np.full(len(seen), FULL_TILE, np.int32)
        marks[kept & ~full] = [shapes.setdefault(bits.tobytes(), len(shapes)) for bits in packed]
        rows.append(open_rows[kept])
        cols.append(open_cols[kept])
        tile.append(marks[kept])
    for row, start, stop in _full_blocks(pattern, q_len, kv_len, block_q, block_kv):
        rows.append(np.full(stop - start, row))
        cols.append(np.arange(start, stop))
        tile.append(np.full(stop - start, FULL_TILE))
    return _sorted(q_len, kv_len, block_q, block_kv, rows, cols, tile, shapes)


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


def count(pattern: Pattern, q_len: int, kv_len: int, block: int = 64) -> int:
    """The exact number of visible pairs of ``pattern`` (one that is not per head)."""
    seen = sum(int(seen.sum()) for _, _, seen, _ in _open_blocks(pattern, q_len, kv_len, block, block))
    for row, start, stop in _full_blocks(pattern, q_len, kv_len, block, block):
        tall, wide = min(block, q_len - row * block), min(stop * block, kv_len) - start * block
        seen += tall * wide
    return seen


def _block_ranges(
    pattern: Pattern, q_len: int, kv_len: int, block_q: int, block_kv: int
) -> Iterator[tuple[int, Ranges, Ranges]]:
    """For each block row: the key blocks that are visible as a whole, and those that have to be looked at."""
    offset = kv_len - q_len
    last_block = -(-kv_len // block_kv)
    for row in range(-(-q_len // block_q)):
        first, last = row * block_q + offset, min((row + 1) * block_q, q_len) - 1 + offset
        reach = pattern.reach(first, last, kv_len)
        full = tuple(
            (-(-start // block_kv), last_block if stop == kv_len else stop // block_kv)
            for start, stop in clipped(reach.all, kv_len)
        )
        some = tuple((start // block_kv, -(-stop // block_kv)) for start, stop in clipped(reach.some, kv_len))
        full = clipped(full, last_block)
        yield row, full, without(clipped(some, last_block), full)


def _full_blocks(
    pattern: Pattern, q_len: int, kv_len: int, block_q: int, block_kv: int
) -> Iterator[tuple[int, int, int]]:
    for row, full, _ in _block_ranges(pattern, q_len, kv_len, block_q, block_kv):
        for start, stop in full:
            yield row, start, stop


def _open_blocks(
    pattern: Pattern, q_len: int, kv_len: int, block_q: int, block_kv: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]]:
    """In portions: block rows, key blocks, the visible pairs [n, block_q, block_kv], and which pairs exist."""
    portion = max(1, _PAIRS // (block_q * block_kv))
    pairs: list[tuple[int, int]] = []
    for row, _, looked_at in _block_ranges(pattern, q_len, kv_len, block_q, block_kv):
        for start, stop in looked_at:
            for begin in range(start, stop, portion):
                pairs += [(row, col) for col in range(begin, min(stop, begin + portion))]
                if len(pairs) >= portion:
                    yield _looked_at(pattern, pairs, q_len, kv_len, block_q, block_kv)
                    pairs = []
    if pairs:
        yield _looked_at(pattern, pairs, q_len, kv_len, block_q, block_kv)


def _looked_at(
    pattern: Pattern, pairs: list[tuple[int, int]], q_len: int, kv_len: int, block_q: int, block_kv: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    blocks = np.asarray(pairs, np.int64)
    with _disable_current_modes(), torch.device("cpu"):
        row, col = torch.from_numpy(blocks).unsqueeze(-1).unbind(1)
        query = (row * block_q + torch.arange(block_q)).unsqueeze(2)
        key = (col * block_kv + torch.arange(block_kv)).unsqueeze(1)
        inside = (query < q_len) & (key < kv_len)
        i, j = query.clamp(max=q_len - 1) + (kv_len - q_len), key.clamp(max=kv_len - 1)
        seen = pattern.visible(i, j) & inside
        return blocks[:, 0], blocks[:, 1], seen.numpy(), inside.numpy()
