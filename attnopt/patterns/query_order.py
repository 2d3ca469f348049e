"""Reordered queries, so that the queries of a block see similar keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnopt.base.intervals import Reach, common, merged
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.block_layout import Layout


@lru_cache(maxsize=64)
def order_of(pattern: Pattern, q_len: int) -> NDArray[np.int64] | None:
    """Query indices [q_len] in the order that ``pattern`` asks for; None for the natural order."""
    order = pattern.order(q_len)
    return None if order is None or (np.diff(order) == 1).all() else order


def ordered_layout(pattern: Pattern, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Layout:
    """The layout in which query n is query ``order_of(pattern)[n]``."""
    if order_of(pattern, q_len) is None:
        return pattern.layout(q_len, kv_len, block_q, block_kv)
    return _Ordered(pattern, q_len, kv_len).layout(q_len, kv_len, block_q, block_kv)


@dataclass(frozen=True, repr=False)
class _Ordered(Pattern):
    """``inner`` at fixed lengths with reordered queries; only used for its layout."""

    inner: Pattern
    q_len: int
    kv_len: int

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        offset = self.kv_len - self.q_len
        return self.inner.at_length(self.kv_len).visible(torch.from_numpy(self._places)[i - offset] + offset, j)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        offset = self.kv_len - self.q_len
        places = np.sort(self._places[first - offset : last - offset + 1]) + offset
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        found = [self.inner.reach(int(run[0]), int(run[-1]), kv_len) for run in runs]
        return Reach(all=reduce(common, (r.all for r in found)), some=merged(k for r in found for k in r.some))

    @property
    def _places(self) -> NDArray[np.int64]:
        order = order_of(self.inner, self.q_len)
        assert order is not None
        return order
