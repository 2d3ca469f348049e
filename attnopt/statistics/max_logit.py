"""Logit growth: how large the scores before the softmax are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnopt.ir.importance import Importance
from attnopt.ir.site import Site
from attnopt.ir.weight_rows import in_blocks, logits_of, of_sequence, rows_at_once
from attnopt.statistics.calibrated import calibrated


@dataclass(frozen=True)
class MaxLogit(Importance):
    """max |scale q_i . k_j| over the pairs that are visible and no padding (arXiv:2302.05442; LS-attention's stability).

    Before bias and softcap.  ``now.since(before)`` of two results is the growth between two models.
    """

    name: ClassVar[str] = "max-logit"
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        now, largest = calibrated(site), torch.zeros(site.num_heads, dtype=torch.float64)
        for t, everything in zip(now.operands(site.spec), now.batches, strict=True):
            size = rows_at_once(site.spec, t.k.shape[2])
            for sequence in range(len(t.q)):
                own = of_sequence(t, sequence)
                for rows in in_blocks(everything.real[sequence], size):
                    logits, seen = logits_of(site.spec, own, rows)
                    largest = torch.maximum(largest, (logits.abs() * seen).amax((1, 2)).cpu())
        return largest.tolist()
