"""The length of the queries and keys of each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnopt.ir.importance import Importance
from attnopt.ir.site import Site
from attnopt.statistics.calibrated import sequences_of


@dataclass(frozen=True)
class QueryNorm(Importance):
    """Mean length of the head's queries over tokens."""

    name: ClassVar[str] = "query-norm"
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return _mean_lengths(site, "q")


@dataclass(frozen=True)
class KeyNorm(Importance):
    """Mean length of the keys that the head reads (KDGQA, arXiv:2408.08454).

    The change of it during training, by which DGQA of the same paper allots queries: ``now.since(before)`` of two results.
    """

    name: ClassVar[str] = "key-norm"
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return _mean_lengths(site, "k")


def _mean_lengths(site: Site, role: str) -> list[float]:
    total, tokens = torch.zeros(site.num_heads, dtype=torch.float64), 0
    for x_NHD in sequences_of(site, role):
        total += x_NHD.norm(dim=-1).sum(0).cpu()
        tokens += len(x_NHD)
    return (total / tokens).tolist()
