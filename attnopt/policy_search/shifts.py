"""Where the outputs of a model move: a linear model, of which the squared length is the divergence."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attnopt.policy_search.judge import Part
from attnopt.policy_search.menu import Picks, Table
from attnopt.policy_search.quadratic import Form

Piece = Sequence[tuple[Picks, Part]]
PRIOR = 0.2  # how far, relatively, a shift among others may be from that of the same choice alone
NOISE = 0.1  # of a shift: what no sum explains
ALIKE = 2.0  # tried picks that would tell as much as what was known before: that sums are right
SPREAD = 0.5  # of the logarithm of an influence of which nothing is known, in a draw


class Shifts:
    """Together, alternatives move the outputs by about the sum of what they do alone, corrected by what was tried.

    Divergence is the squared length of this sum: what moves the outputs the same way counts double, and what moves them apart
    cancels.  On a piece of the data on which an alternative was not tried alone, its shift is unknown: of the length of its
    influence, and as likely one way as the other, so that it adds as if influences were additive.
    """

    def __init__(self, influence: Table, pieces: Sequence[Piece]) -> None:
        """``influence``: of each alternative alone; infinite where it must not be chosen.  ``pieces``: what was asked on each."""
        self.starts = np.cumsum([0, *map(len, influence)])
        flat = np.array([v for own in influence for v in own], dtype=np.float64)
        known = np.where(np.isfinite(flat), np.maximum(flat, 0.0), 0.0)
        counts = [piece[0][1].weight for piece in pieces if piece]
        size = len(flat)
        self.sure, self.unsure = np.zeros((size, size)), np.zeros((size, size))
        for piece in pieces:
            if piece:
                mean, rest = self._fitted(known * piece[0][1].weight, piece)
                self.sure += mean @ mean.T / sum(counts)
                self.unsure += rest / sum(counts)
        never = np.flatnonzero(~np.isfinite(flat))
        self.sure[never, never] = np.inf

    def _fitted(self, influence: NDArray[np.float64], piece: Piece) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The mean of each alternative's shift on a piece [n, size], and what is not known of them [n, n]."""
        moved = [(p, np.sqrt(part.total) * _unit(part)) for p, part in piece if np.isfinite(part.total)]
        alone = {self._row(p)[0]: y for p, y in moved if sum(map(bool, p)) == 1}
        width = len(moved[0][1]) if moved else 1
        mean, variance = np.zeros((len(influence), width)), (1 + PRIOR**2) * influence
        for i, y in alone.items():
            mean[i], variance[i] = y, PRIOR**2 * float(y @ y)
        tried = [(self._row(p), y) for p, y in moved if sum(map(bool, p)) > 1]
        if not tried:
            return mean, np.diag(variance)
        rows, values = np.zeros((len(tried), len(influence))), np.array([y for _, y in tried])
        for row, (at, _) in zip(rows, tried, strict=True):
            row[at] = 1.0
        factor = _factor(rows @ mean, values)
        mean, variance = factor * mean, factor**2 * variance
        spread = rows * variance
        noise = NOISE**2 * ((values**2).sum(1) + 1e-12 + 0.01 * (values**2).sum(1).max())
        inverse = np.linalg.inv(spread @ rows.T + np.diag(noise))
        return mean + spread.T @ inverse @ (values - rows @ mean), np.diag(variance) - spread.T @ inverse @ spread

    def _row(self, picks: Picks) -> list[int]:
        return [int(self.starts[u]) + a for u, a in enumerate(picks) if a]

    def form(self, draw: random.Random | None = None) -> Form:
        """What the expected divergence is by pairs; drawn: with other lengths where these are not known."""
        found: Form = self.sure + self.unsure
        if draw is None:
            return found
        part = np.sqrt(np.clip(self.unsure.diagonal() / np.maximum(found.diagonal(), 1e-30), 0.0, 1.0))
        scale = np.exp(SPREAD * part * np.array([draw.gauss(0.0, 1.0) for _ in part]))
        drawn: Form = found * scale[:, None] * scale[None]
        return drawn


def _factor(sums: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """How many times as far what was tried together moves along the sum of its parts; of all alike."""
    weight = 1.0 / ((values**2).sum(1) + (sums**2).sum(1) + 1e-30)
    along, length = float(weight @ (sums * values).sum(1)), float(weight @ (sums**2).sum(1))
    return max(along + ALIKE, 0.0) / (length + ALIKE)


def _unit(part: Part) -> NDArray[np.float64]:
    assert part.direction is not None
    return part.direction.astype(np.float64)
