"""Block patterns: random by hash, or given as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import Tensor

from attnopt.base.bit_table import looked_up
from attnopt.base.intervals import Ranges, Reach, as_text, common, from_text, merged
from attnopt.base.options import whole
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.per_head import PerHead

PRIME = 2**31 - 1  # x**5 permutes the numbers below it, and products of two of them fit into int64


@dataclass(frozen=True, repr=False)
class RandomBlocks(Pattern):
    """Every block of ``size`` queries sees ``count`` random blocks of ``size`` keys (BigBird, arXiv:2007.14062).

    The blocks are drawn from ``blocks`` blocks or, if that is None, from those up to the query's own; then a longer
    sequence does not change its prefix.  One block is drawn from each of ``count`` equal parts; with fewer than
    ``count`` blocks, all are visible.  The same ``seed`` draws the same blocks on every machine.
    """

    size: int
    count: int
    blocks: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole("RandomBlocks", "size", self.size, least=1)
        whole("RandomBlocks", "count", self.count)
        whole("RandomBlocks", "seed", self.seed)
        if self.blocks is not None:
            whole("RandomBlocks", "blocks", self.blocks, least=1)

    @property
    def lengths(self) -> range | None:
        return None if self.blocks is None else range((self.blocks - 1) * self.size + 1, self.blocks * self.size + 1)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        row, col = i // self.size, j // self.size
        seen = (i != i) | (j != j)
        for block in self._drawn(row.clamp(min=0)):
            seen = seen | (col == block)
        return seen & (row >= 0) & (row < (PRIME if self.blocks is None else self.blocks))

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        known = range(PRIME if self.blocks is None else self.blocks)
        rows = range(first // self.size, last // self.size + 1)
        seen = [merged((b * self.size, (b + 1) * self.size) for b in self._drawn(row)) for row in rows if row in known]
        is_inside = len(seen) == len(rows)
        return Reach(all=reduce(common, seen) if is_inside else (), some=merged(r for ranges in seen for r in ranges))

    def _drawn(self, row: Any) -> Iterator[Any]:
        """The key blocks of a block row, which is an int or a tensor; some may come twice."""
        among = row + 1 if self.blocks is None else self.blocks
        for part in range(self.count):
            start, stop = part * among // self.count, (part + 1) * among // self.count
            width = stop - start
            yield start + _hashed(self.seed, part, row) % (width + (width == 0))


@dataclass(frozen=True, repr=False, init=False)
class BlockLayout(Pattern):
    """Every block of ``block`` queries sees the blocks of ``block`` keys listed in a square table.

    ``table``: rows of 0s and 1s (lists, an array or a tensor), or a text per row that lists its columns, such as "0-3,
    7".  Positions beyond the table see nothing.  Raises PolicyError.
    """

    table: tuple[Ranges, ...]
    block: int

    def __init__(self, table: object, block: int) -> None:
        rows = table.tolist() if hasattr(table, "tolist") else table
        if not isinstance(rows, (list, tuple)) or not rows:
            raise PolicyError(f"BlockLayout: invalid value table={table!r}: expected a square table of 0s and 1s")
        read = tuple(_row(number, row, len(rows)) for number, row in enumerate(rows))
        object.__setattr__(self, "table", read)
        object.__setattr__(self, "block", whole("BlockLayout", "block", block, least=1))

    @classmethod
    def per_head(cls, tables: Any, block: int) -> Pattern:
        """One table per head, such as a tensor [heads, rows, rows]."""
        return PerHead({head: cls(table, block) for head, table in enumerate(tables)})

    @property
    def lengths(self) -> range:
        return range((len(self.table) - 1) * self.block + 1, len(self.table) * self.block + 1)

    @property
    def is_causal(self) -> bool:
        return self.block == 1 and all(not row or row[-1][1] <= number + 1 for number, row in enumerate(self.table))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        count = len(self.table)
        row, col = i // self.block, j // self.block
        bits = [sum((1 << stop) - (1 << start) for start, stop in ranges) for ranges in self.table]
        seen = looked_up(bits, count, row.clamp(0, count - 1), col.clamp(0, count - 1))
        return seen & (row >= 0) & (row < count) & (col >= 0) & (col < count)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        rows = range(first // self.block, last // self.block + 1)
        known = [self.table[row] for row in rows if 0 <= row < len(self.table)]
        some = merged(r for ranges in known for r in ranges)
        sure = reduce(common, known) if len(known) == len(rows) else ()
        return Reach(*(tuple((a * self.block, b * self.block) for a, b in ranges) for ranges in (sure, some)))

    def __repr__(self) -> str:
        return f"BlockLayout(table={tuple(map(as_text, self.table))}, block={self.block})"


def _hashed(*numbers: Any) -> Any:
    """A pseudo-random number below PRIME from ints or tensors; deterministic on every machine."""
    mixed: Any = 1
    for number in numbers:
        mixed = (mixed * 48271 + number + 11) % PRIME
        square = mixed * mixed % PRIME
        mixed = square * square % PRIME * mixed % PRIME
    return mixed


def _row(number: int, row: object, columns: int) -> Ranges:
    where = f"BlockLayout: row {number} of table"
    if isinstance(row, str):
        columns_of_row = from_text(row)
        if columns_of_row is None:
            raise PolicyError(f'{where}: invalid value {row!r}: expected columns such as "0-3, 7"')
        found = columns_of_row
    elif isinstance(row, Iterable) and all(isinstance(cell, (int, float)) and cell in (0, 1) for cell in row):
        cells = list(row)
        if len(cells) != columns:
            raise PolicyError(
                f"{where} has {len(cells)} columns, but the table has {columns} rows; the table must be square"
            )
        found = merged((col, col + 1) for col, cell in enumerate(cells) if cell)
    else:
        raise PolicyError(f"{where}: invalid value {row!r}: expected a row of 0s and 1s")
    if found and found[-1][1] > columns:
        raise PolicyError(f"{where} names column {found[-1][1] - 1}, but the table has only {columns} columns")
    return found
