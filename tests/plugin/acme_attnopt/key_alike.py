"""A row score: how much a query asks for what the other tokens have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnopt import RowScores


@dataclass(frozen=True)
class KeyAlike(RowScores):
    """The product of a query and the mean key, summed over heads."""

    of_keys: ClassVar[bool] = True

    def score(
        self, q_BHLD: Tensor, k_BHSD: Tensor, *, real_BL: Tensor | None, received: Callable[[int], Tensor]
    ) -> Tensor:
        if real_BL is None:
            mean_BHD = k_BHSD.mean(2)
        else:
            share_BL = real_BL / real_BL.sum(1, keepdim=True).clamp(min=1)
            mean_BHD = (k_BHSD * share_BL[:, None, :, None].to(k_BHSD.dtype)).sum(2)
        return (q_BHLD * mean_BHD.unsqueeze(2)).sum((1, 3))
