"""Massive values: features of queries and keys that are far larger than the others of their head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.options import choice, number
from attnopt.errors import PolicyError
from attnopt.ir.curves import Curves
from attnopt.ir.importance import Importance
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic
from attnopt.statistics.calibrated import sequences_of


@dataclass(frozen=True)
class MassiveFeatures(Importance):
    """The number of massive features of a head's queries or keys (arXiv:2502.01563)::

        n_d = (sum_t x_td^2)^1/2          # over the tokens, for each of the D features
        #{d : n_d > times * mean(n)}

    ``of``: "k" or "q", as they enter the product: after rotary positions and norms.  At most D / times features can be
    massive.  The profile is n_d / mean(n).  Raises PolicyError.
    """

    name: ClassVar[str] = "massive-features"
    needs_calibration: ClassVar[bool] = True
    of: str = "k"
    times: float = 5.0

    def __post_init__(self) -> None:
        choice(self.name, "of", self.of, ("q", "k"))
        if number(self.name, "times", self.times) < 1:
            raise PolicyError(f"{self.name}: invalid value times={self.times!r}: expected a number of at least 1")

    def scores(self, site: Site) -> Sequence[float]:
        return (self._relative(site) > self.times).sum(1).double().tolist()

    def profile(self, site: Site) -> Curves:
        relative = self._relative(site)
        return Curves.of(f"feature of {self.of}", range(relative.shape[1]), relative)

    def _relative(self, site: Site) -> Tensor:
        norms = FeatureNorms(self.of).of(site)
        return norms / norms.mean(1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)


@dataclass(frozen=True)
class FeatureNorms(Statistic[Tensor]):
    """The length of each feature over all tokens, [H, D]."""

    role: str

    def measure(self, site: Site) -> Tensor:
        squares = [x_NHD.square().sum(0).cpu() for x_NHD in sequences_of(site, self.role)]
        return torch.stack(squares).sum(0).sqrt()
