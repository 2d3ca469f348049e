"""How far data lie from those that an attention was fitted to: the mean leverage of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.fit.least_squares import with_ones
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic

SHRINKAGE = 1e-3  # of the mean square of a feature


@dataclass(frozen=True)
class MeanMoments(Statistic[Tensor]):
    """[H * Dv + 1, H * Dv + 1]: the mean over all tokens of the products of the heads' outputs, and of these with a one."""

    def measure(self, site: Site) -> Tensor:
        now = site.activations
        assert now is not None
        sums, tokens = torch.zeros(()), 0
        for z, t in zip(now.outputs(site.spec), now.batches, strict=True):
            features = with_ones(z, t.real)
            sums, tokens = sums.to(features.device) + features.T @ features, tokens + len(features)
        return sums / max(tokens, 1)


def relative_leverage(home: Tensor, away: Tensor) -> float:
    """tr(A (M + reg)^-1) / tr(M (M + reg)^-1), of the mean moments M that a fit saw and A of other data.

    The variance of a prediction by least squares at x is proportional to x' M^-1 x: this is how many times as large as at home
    it is on the other data.  1 for the same data; no scale and no basis of the heads matters, up to ``reg``.
    """
    scale = float(home.diagonal()[:-1].mean())
    reg = SHRINKAGE * max(scale, torch.finfo(torch.float64).tiny)
    inverse = torch.linalg.inv(home + reg * torch.eye(len(home), dtype=home.dtype, device=home.device))
    return float((away * inverse).sum() / (home * inverse).sum())
