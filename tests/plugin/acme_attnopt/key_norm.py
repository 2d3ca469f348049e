"""A block score: how much a block of queries probably attends to a block of keys."""

from dataclasses import dataclass

from torch import Tensor

from attnopt import BlockScores


@dataclass(frozen=True)
class KeyNorm(BlockScores):
    """The largest key norm in a block."""

    def score(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        longest_BHM = k_BHMTD.norm(dim=-1).amax(-1)
        return longest_BHM.unsqueeze(2).expand(-1, -1, q_BHNTD.shape[2], -1)
