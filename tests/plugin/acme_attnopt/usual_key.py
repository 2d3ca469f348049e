"""A block score that is fitted: how unusual the keys of a block are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt import BlockSample, BlockScores, Constant


@dataclass(frozen=True)
class UsualKey(BlockScores):
    """The largest distance of a key in a block from the mean key of the calibration data."""

    needs_calibration: ClassVar[bool] = True

    def fit(self, samples: Sequence[BlockSample]) -> tuple[Constant, ...]:
        totals = [(s.k * s.k_counts[:, None, :, :, None]).sum((0, 2, 3)) for s in samples]  # [H, D] each
        tokens = sum(int(s.k_counts.sum()) for s in samples)
        return (Constant.of(torch.stack(totals).sum(0) / max(1, tokens)),)

    def score(
        self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool, constants: Sequence[Tensor] = ()
    ) -> Tensor:
        (usual_HD,) = constants
        furthest_BHM = (k_BHMTD - usual_HD[:, None, None].to(k_BHMTD.dtype)).norm(dim=-1).amax(-1)
        return furthest_BHM.unsqueeze(2).expand(-1, -1, q_BHNTD.shape[2], -1)
