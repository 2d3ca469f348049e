"""How far the attention of a head is from uniform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnopt.ir.importance import Importance
from attnopt.ir.site import Site
from attnopt.statistics.calibrated import rows_of


@dataclass(frozen=True)
class Entropy(Importance):
    """One minus the entropy of the attention over keys, relative to uniform weights over the visible ones; the mean over
    queries.  The weights of a query are taken relative to their sum: what a sink takes says nothing about keys."""

    name: ClassVar[str] = "entropy"
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        total, rows = torch.zeros(site.num_heads, dtype=torch.float64), 0
        for block in rows_of(site):
            p = block.weights / block.weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            most = (p > 0).sum(-1).double().log().clamp(min=1e-9)
            total += (1 - torch.special.entr(p).sum(-1) / most).sum(1).cpu()
            rows += len(block.rows)
        return (total / rows).tolist()
