"""Mean attention maps of sequences of any lengths, on a grid that is as large for one sequence as for a million."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attnopt.base.cells import averaged, regridded, shared


class MeanMaps:
    """The sum of maps on a grid of at most ``cells`` x ``cells``, and of how many sequences it is.

    The i-th of n tokens that count covers [i / n, (i + 1) / n) of its sequence, and a cell as much of every sequence.  A row of
    the grid is the mean of its queries, a column the sum of its keys.  Where all sequences are of one length that fits, each
    token has a cell of its own.  Every step is linear, so that the order of the sequences does not matter.
    """

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.total = torch.zeros(())
        self.sequences = 0
        self.lengths: list[tuple[int, int]] = []  # of queries and of keys, the least and the largest

    def add(self, blocks: Iterable[tuple[Tensor, Tensor]], real_BL: Tensor, seen_BS: Tensor) -> None:
        """``blocks``: some queries [R] and their weights [B, H, R, S].  ``real_BL``, ``seen_BS``: the queries and keys that are
        no padding."""
        whole = real_BL.any(1) & seen_BS.any(1)  # other sequences are nothing but padding
        if not bool(whole.any()):
            return
        real_BL, seen_BS = real_BL & whole[:, None], seen_BS & whole[:, None]
        rows, columns = self._sizes(real_BL[whole], seen_BS[whole])
        averages = averaged(real_BL, rows).float()
        shares = shared(seen_BS, columns).float()
        for at, weights_BHRS in blocks:
            x = weights_BHRS.float() @ shares.unsqueeze(1)
            found = (averages.index_select(2, at).unsqueeze(1) @ x).sum(0)  # [H, rows, columns]
            self.total = self.total + found.double().cpu()
        self.sequences += int(whole.sum())

    def mean(self) -> Tensor:
        """[H, rows, columns] in float32."""
        return (self.total / max(1, self.sequences)).float()

    def _sizes(self, real_BL: Tensor, seen_BS: Tensor) -> tuple[int, int]:
        """Those of the grid with these sequences; what it holds is brought to them."""
        before = self.lengths
        self.lengths = [_range(x.sum(1).tolist()) for x in (real_BL, seen_BS)]
        if before:
            self.lengths = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(before, self.lengths, strict=True)]
        rows, columns = (n if n == least and n <= self.cells else self.cells for least, n in self.lengths)
        if before and self.total.shape[1:] != (rows, columns):
            self.total = regridded(self.total, rows, columns)
        return rows, columns


def _range(lengths: list[int]) -> tuple[int, int]:
    return min(lengths), max(lengths)
