"""Attention sinks: how much of the attention of all queries lies on one key, or on the first ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.options import whole
from attnopt.ir.curves import Curves
from attnopt.ir.importance import Importance
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic
from attnopt.statistics.calibrated import rows_of

SHOWN = 64  # keys in a profile


@dataclass(frozen=True)
class SinkMass(Importance):
    """The attention mass on a sink (StreamingLLM, arXiv:2309.17453; arXiv:2410.10781)::

        m_j = 1/L sum_i p_ij       # the mean over the queries of a sequence, for each of its keys
        sum_{j < keys} m_j         # or max_j m_j without ``keys``: the heaviest key of each sequence

    and the mean over sequences, by their queries.  Keys and queries that are padding do not count: the first key is the first
    that is none.  ``keys=None``: the heaviest key.  The profile is m_j of the first keys.  Raises PolicyError.
    """

    name: ClassVar[str] = "sink-mass"
    needs_calibration: ClassVar[bool] = True
    keys: int | None = 1

    def __post_init__(self) -> None:
        if self.keys is not None:
            whole(self.name, "keys", self.keys, least=1)

    def scores(self, site: Site) -> Sequence[float]:
        total, rows = torch.zeros(site.num_heads, dtype=torch.float64), 0
        for mass_HS, queries in ColumnMasses().of(site):
            total += mass_HS.amax(1) if self.keys is None else mass_HS[:, : self.keys].sum(1)
            rows += queries
        return (total / rows).tolist()

    def profile(self, site: Site) -> Curves:
        masses = ColumnMasses().of(site)
        longest = min(SHOWN, max(mass.shape[1] for mass, _ in masses))
        total, rows = torch.zeros(site.num_heads, longest, dtype=torch.float64), torch.zeros(longest)
        for mass_HS, queries in masses:
            n = min(longest, mass_HS.shape[1])
            total[:, :n] += mass_HS[:, :n]
            rows[:n] += queries
        return Curves.of("key", range(longest), total / rows)


@dataclass(frozen=True)
class ColumnMasses(Statistic[list[tuple[Tensor, int]]]):
    """For each sequence the attention on each of its keys [H, S], summed over its queries, and the number of these."""

    def measure(self, site: Site) -> list[tuple[Tensor, int]]:
        found: dict[tuple[int, int], tuple[Tensor, int]] = {}
        for block in rows_of(site):
            place = block.batch, block.sequence
            mass = block.weights.sum(1)[:, block.keys].cpu()
            before, rows = found.get(place, (torch.zeros_like(mass), 0))
            found[place] = before + mass, rows + len(block.rows)
        return list(found.values())
