"""Which heads to keep: block optimal brain surgeon on the layer's least squares.

OSSCAR, arXiv:2403.12983; Optimal BERT Surgeon, arXiv:2203.07259.

With A = Z'Z + reg I over the features of the heads that are left and W the best output weights for them, taking head h
out raises the squared error by tr(W_h' [(A^-1)_hh]^-1 W_h), and the remaining heads have optimal weights again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.fit.least_squares import LayerMoments, Moments, combined, fittable_weights
from attnopt.ir.peers import Peers, divided
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic

SHRINKAGE = 1e-3  # of the mean square of a feature
ENUMERATED = 64  # at most this many sets are tried exhaustively


@dataclass(frozen=True)
class Surgeon:
    """The least squares of one layer: ``moments`` over ``heads`` heads of ``width`` features each and a column of ones."""

    moments: Moments
    today: Tensor
    heads: int
    width: int
    has_bias: bool
    peers: Peers | None = None  # who have the same moments, and try other sets of heads

    def removal_costs(self, places: Sequence[int]) -> list[float]:
        """For each head at ``places``, the increase of the squared error without it, relative to the targets."""
        inverse, weights = self._solved(places)
        return [c / max(self.moments.yy, 1e-300) for c in self._costs(inverse, weights, len(places))]

    def nested(
        self, protected: Sequence[int] = (), least: int = 1, known: Mapping[int, tuple[int, ...]] | None = None
    ) -> dict[int, tuple[int, ...]]:
        """For each number of heads, the best set of positions found: the cheapest head is removed, then outside heads are
        swapped in while that helps; few sets are tried exhaustively.  ``protected`` positions stay.  ``known``: what was found
        before, from which it goes on."""
        found = dict(known or {self.heads: tuple(range(self.heads))})
        places = found[min(found)]
        while len(places) > max(least, len(protected)):
            if math.comb(self.heads, len(places) - 1) <= ENUMERATED:
                sets = combinations(range(self.heads), len(places) - 1)
                places = self._best([s for s in sets if set(protected) <= set(s)])
            else:
                places = self._swapped(self._without_cheapest(places, protected), protected)
            found[len(places)] = places
        return found

    def error(self, places: Sequence[int]) -> float:
        """Squared error with only these heads and the best weights for them, relative to the targets."""
        a, r, features = self._system(places)
        return self.moments.of(features).error(torch.linalg.solve(a, r))

    def error_unfitted(self, places: Sequence[int], mean: bool = False) -> float:
        """The same with the weights that these heads have now; ``mean``: the bias makes up for the mean of the others."""
        features = self._features(places)
        weights = torch.zeros_like(self.today)
        weights[features] = self.today[features]
        if mean and self.has_bias:
            wrong = self.moments.zy[-1] - self.moments.zz[-1] @ weights
            weights[-1] = wrong / self.moments.zz[-1, -1]
        return self.moments.error(weights)

    def _best(self, sets: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        errors = divided([partial(self.error, s) for s in sets], self.peers)
        return sets[errors.index(min(errors))]

    def _without_cheapest(self, places: Sequence[int], protected: Sequence[int]) -> tuple[int, ...]:
        costs = dict(zip(places, self.removal_costs(places), strict=True))
        least = min((p for p in places if p not in protected), key=costs.__getitem__)
        return tuple(p for p in places if p != least)

    def _swapped(self, places: tuple[int, ...], protected: Sequence[int]) -> tuple[int, ...]:
        """Add the most useful head and remove the least useful one, until both are the same."""
        error = self.error(places)
        while True:
            outside = [p for p in range(self.heads) if p not in places]
            helped = [tuple(sorted((*places, p))) for p in outside]
            larger = self._best(helped)
            smaller = self._without_cheapest(larger, protected)
            if smaller == places or not self.error(smaller) < error * (1 - 1e-9):
                return places
            places, error = smaller, self.error(smaller)

    def _features(self, places: Sequence[int]) -> Tensor:
        found = [p * self.width + i for p in places for i in range(self.width)]
        return torch.tensor(found + [self.heads * self.width] * self.has_bias)

    def _system(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        features = self._features(places)
        m = self.moments.of(features)
        reg = SHRINKAGE * max(float(self.moments.zz.diagonal()[:-1].mean()), 1e-300)
        a = m.zz + reg * torch.eye(len(m.zz), dtype=m.zz.dtype)
        return a, m.zy + reg * self.today[features], features

    def _solved(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        a, r, _ = self._system(places)
        inverse = torch.linalg.inv(a)
        return inverse, inverse @ r

    def _costs(self, inverse: Tensor, weights: Tensor, count: int) -> list[float]:
        found: list[float] = []
        for i in range(count):
            s = slice(i * self.width, (i + 1) * self.width)
            found.append(float((weights[s] * torch.linalg.solve(inverse[s, s], weights[s])).sum()))
        return found


def surgeon_of(site: Site) -> Surgeon:
    """The least squares of the site's layer over all calibration data.  Raises CalibrationError."""
    today = fittable_weights(site)
    moments = combined(LayerMoments().of(site))
    peers = None if site.activations is None else site.activations.peers
    return Surgeon(moments, today, site.num_heads, site.value_dim, site.out_bias() is not None, peers)


@dataclass(frozen=True)
class _Nested(Statistic[dict[int, tuple[int, ...]]]):
    """Of the site's layer, filled as far as it is asked for: other numbers of heads ask for the same sets."""

    protected: tuple[int, ...]
    merges: ClassVar[bool] = True

    def measure(self, site: Site) -> dict[int, tuple[int, ...]]:
        return {}

    def merged(self, parts: Sequence[dict[int, tuple[int, ...]]]) -> dict[int, tuple[int, ...]]:
        return {}


def nested_heads(site: Site, protected: Sequence[int], least: int) -> Mapping[int, tuple[int, ...]]:
    """``Surgeon.nested`` of the site's layer, each set found once.  Raises CalibrationError."""
    known = _Nested(tuple(protected)).of(site)
    if not known or min(known) > least:
        known.update(surgeon_of(site).nested(protected, least, known))
    return known
