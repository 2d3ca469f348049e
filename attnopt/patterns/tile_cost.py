"""The fraction of pairs that a kernel computes for a pattern, given its tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnopt.patterns.algebra import Pattern
from attnopt.patterns.block_layout import FULL_TILE
from attnopt.patterns.query_order import ordered_layout


@dataclass(frozen=True)
class Tiles:
    """A kernel that works in blocks of ``block_q`` queries and ``block_kv`` keys.

    ``group``: in a partly visible block, it skips keys that none of ``group`` neighbouring queries sees; None: it
    computes the whole block.  ``reorders``: it takes the queries in the order that the pattern asks for.
    """

    name: str
    block_q: int
    block_kv: int
    group: int | None = None
    reorders: bool = False

    def share(self, pattern: Pattern, q_len: int, kv_len: int, num_heads: int) -> float:
        """Computed pairs as a fraction of all pairs, averaged over the heads."""
        of_head = [pattern.for_head(h) for h in range(num_heads)]
        shares = {p: self._share(p, q_len, kv_len) for p in set(of_head)}
        return sum(shares[p] for p in of_head) / max(1, num_heads)

    def _share(self, pattern: Pattern, q_len: int, kv_len: int) -> float:
        found = (ordered_layout if self.reorders else Pattern.layout)(
            pattern, q_len, kv_len, self.block_q, self.block_kv
        )
        if self.group is None or not len(found.tiles):
            return found.visits
        full = found.tile == FULL_TILE
        tall = np.minimum(self.block_q, q_len - found.rows.astype(np.int64) * self.block_q)
        wide = np.minimum(self.block_kv, kv_len - found.cols.astype(np.int64) * self.block_kv)
        groups = found.tiles.reshape(len(found.tiles), self.block_q // self.group, self.group, self.block_kv)
        partly = groups.any(2).sum((1, 2)) * self.group
        pairs = int((tall * wide)[full].sum()) + int(partly[found.tile[~full]].sum())
        return min(1.0, pairs / max(1, q_len * kv_len))


COMPILED = Tiles("compiled CPU kernel", 64, 64, group=32, reorders=True)
FLEX = Tiles("FlexAttention", 128, 128)
KERNELS = (
    COMPILED,
    FLEX,
    Tiles("ONNX Runtime, loop over 128 queries", 128, 64, group=128),
)
