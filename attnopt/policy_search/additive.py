"""A sum over the places that predicts how far a model diverges, fitted to those that were tried."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from attnopt.policy_search.menu import Picks, Table

PRIOR = 0.5  # how far, relatively, an alternative's share may be from what it has alone
GUESSED = 2.0  # how many times as far if that was not measured
FLOOR = 0.05  # of the mean influence: the least that an alternative is taken for
NOISE = 0.1  # of a value: what no sum explains


class Additive:
    """A Bayesian linear model: alone, each alternative has its influence; together, as the tried picks tell.

    Divergence is not additive, but near good picks it nearly is, with other weights than the influences of single
    alternatives: those that are fitted here.
    """

    def __init__(
        self,
        influence: Table,
        tried: Sequence[tuple[Picks, float]],
        base: float,
        guessed: Collection[tuple[int, int]] = (),
    ) -> None:
        """``influence``: of each alternative alone; infinite where unknown.  ``base``: the value of the original.
        ``guessed``: places and alternatives whose influence was not measured."""
        self.base, self.influence = base, influence
        finite = [abs(v) for own in influence for v in own if np.isfinite(v)]
        floor = FLOOR * (sum(finite) / len(finite) if finite else 1.0) or 1.0
        self.scale = [
            [
                (abs(v) + floor) * (GUESSED if (u, a) in guessed else 1.0) if np.isfinite(v) else np.inf
                for a, v in enumerate(own)
            ]
            for u, own in enumerate(influence)
        ]
        self.start = np.cumsum([0, *map(len, influence)])
        known = [(p, v - base) for p, v in tried if np.isfinite(v) and np.isfinite(self._sum(p))]
        self.mean, self.root = self._fitted(known)

    def _sum(self, picks: Picks) -> float:
        return sum(self.influence[u][a] for u, a in enumerate(picks))

    def _row(self, picks: Picks) -> NDArray[np.float64]:
        row = np.zeros(self.start[-1])
        for u, a in enumerate(picks):
            if a:
                row[self.start[u] + a] = self.scale[u][a]
        return row

    def _prior(self) -> NDArray[np.float64]:
        return np.array(
            [
                v / s if np.isfinite(v) else 1.0
                for vs, ss in zip(self.influence, self.scale, strict=True)
                for v, s in zip(vs, ss, strict=True)
            ]
        )

    def _fitted(self, known: Sequence[tuple[Picks, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The mean of the weights, and a root of their covariance."""
        prior = self._prior()
        if not known:
            return prior, PRIOR * np.eye(len(prior))
        rows, values = np.array([self._row(p) for p, _ in known]), np.array([v for _, v in known])
        least = 0.01 * float(np.abs(values).max()) or 1.0
        weight = 1.0 / (NOISE * (np.abs(values) + least)) ** 2
        plain = rows @ prior
        factor = float((weight * plain * values).sum() / ((weight * plain**2).sum() or 1.0))
        prior = prior * (factor if factor > 0 else 1.0)
        precision = rows.T @ (rows * weight[:, None]) + np.eye(len(prior)) / PRIOR**2
        mean = np.linalg.solve(precision, rows.T @ (weight * values) + prior / PRIOR**2)
        return mean, np.linalg.inv(np.linalg.cholesky(precision)).T

    def value(self, picks: Picks) -> float:
        """The prediction; infinite if an influence is unknown."""
        if not np.isfinite(self._sum(picks)):
            return float("inf")
        return self.base + float(self._row(picks) @ self.mean)

    def table(self, draw: random.Random | None = None) -> list[list[float]]:
        """Each alternative's share: the mean, or a draw."""
        weights = self.mean
        if draw is not None:
            weights = weights + self.root @ np.array([draw.gauss(0.0, 1.0) for _ in weights])
        return [
            [0.0 if a == 0 else s * float(weights[self.start[u] + a]) for a, s in enumerate(own)]
            for u, own in enumerate(self.scale)
        ]
