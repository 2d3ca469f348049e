"""An importance method with an option and a profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnopt import Curves, Importance, Site


@dataclass(frozen=True)
class Diagonal(Importance):
    """The attention of a query to the ``width`` keys up to its own, the mean over all queries of a batch without padding."""

    name: ClassVar[str] = "acme.diagonal"
    needs_calibration: ClassVar[bool] = True
    width: int = 1

    def scores(self, site: Site) -> Sequence[float]:
        return [sum(row) for row in self.profile(site).values]

    def profile(self, site: Site) -> Curves:
        assert site.activations is not None
        maps = list(site.activations.weights(site.spec))
        at = range(self.width)
        sums = [sum(p.diagonal(-d, 2, 3).sum((0, 2)) for p in maps) for d in at]
        queries = sum(p.shape[0] * p.shape[2] for p in maps)
        return Curves.of("keys back", at, torch.stack(sums, 1) / queries)
