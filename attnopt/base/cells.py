"""Sequences of any length on a grid of cells: the i-th of n tokens covers [i / n, (i + 1) / n), and so do the cells."""

from __future__ import annotations

import torch
from torch import Tensor


def regridded(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Maps [..., R, C] on another grid."""
    R, C = maps.shape[-2:]
    averages = averaged(torch.ones(1, R, dtype=torch.bool), rows)[0].to(maps.dtype)
    shares = shared(torch.ones(1, C, dtype=torch.bool), columns)[0].to(maps.dtype)
    return averages @ maps @ shares


def averaged(counted_BN: Tensor, cells: int) -> Tensor:
    """[B, cells, N]: the factors of the mean over each cell; each row sums to 1 if any token counts."""
    return _overlap(counted_BN, cells) / counted_BN.sum(1).clamp(min=1)[:, None, None]


def shared(counted_BN: Tensor, cells: int) -> Tensor:
    """[B, N, cells]: which share of each token lies in each cell; each row of a token that counts sums to 1."""
    return _overlap(counted_BN, cells).mT / cells


def _overlap(counted_BN: Tensor, cells: int) -> Tensor:
    """[B, cells, N]: of each cell and token, in units of 1 / (cells * tokens that count)."""
    n = counted_BN.sum(1)[:, None, None]
    place = (counted_BN.cumsum(1) - 1)[:, None, :]
    cell = torch.arange(cells, device=counted_BN.device)[None, :, None]
    start = torch.maximum(place * cells, cell * n)
    end = torch.minimum((place + 1) * cells, (cell + 1) * n)
    return ((end - start).clamp(min=0) * counted_BN[:, None, :]).double()
