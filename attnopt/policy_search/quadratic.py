"""A sum over all pairs of choices, and the picks with which it is least within limits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from attnopt.policy_search.knapsack import best_picks
from attnopt.policy_search.menu import ROOM, Limits, Menu, Picks

Form = NDArray[np.float64]  # [n, n], of all alternatives of all places in turn; infinite on the diagonal: never chosen
GAIN = 1e-9  # of the largest number: less than that is rounding


class Quadratic:
    """x' F x, where x has a one for what is picked at each place."""

    def __init__(self, form: Form, menu: Menu) -> None:
        counts = [len(own) for own in next(iter(menu.changes.values()))]
        self.menu, self.starts = menu, np.cumsum([0, *counts])
        self.place = np.repeat(np.arange(menu.places), counts)
        open_ones = [self.starts[u] + a for u, own in enumerate(menu.allowed) for a in own]
        self.is_open = np.isin(np.arange(len(form)), open_ones) & np.isfinite(form.diagonal())
        self.form = np.where(np.isfinite(form), form, 0.0)
        self.costs = {r: np.concatenate([np.array(own) for own in t]) for r, t in menu.changes.items()}

    def least(self, limits: Limits, starts: Iterable[Picks]) -> Picks | None:
        """From each start and from the knapsack of the diagonal, down as far as it goes: the best end.  None if nothing fits."""
        diagonal = np.where(self.is_open, self.form.diagonal(), np.inf)
        table = [diagonal[a:b].tolist() for a, b in zip(self.starts, self.starts[1:], strict=False)]
        ends = [self._descended(p, limits) for p in (*starts, best_picks(table, self.menu, limits)) if p is not None]
        return min(ends, key=lambda p: (self.value(p), p), default=None)

    def value(self, picks: Picks) -> float:
        at = self.starts[:-1] + np.array(picks)
        return float(self.form[np.ix_(at, at)].sum())

    def _descended(self, picks: Picks, limits: Limits) -> Picks:
        """By the best switch of one or of two places, as long as one gains."""
        at = self.starts[:-1] + np.array(picks)
        least = -GAIN * float(np.abs(self.form).max())
        while True:
            gains = np.where(self._fitting(at, limits), self._changes(at), np.inf)
            i, j = divmod(int(gains.argmin()), len(gains))
            if not gains[i, j] < least:
                return tuple(int(a) for a in at - self.starts[:-1])
            at[self.place[i]], at[self.place[j]] = i, j

    def _changes(self, at: NDArray[np.int64]) -> Form:
        """[n, n]: what the sum gains if the places of both get them; that of one alone on the diagonal."""
        f, now = self.form, at[self.place]
        rows = f[:, at].sum(1)
        alone = f.diagonal() - f[now, now] + 2 * (rows - f[np.arange(len(f)), now] - rows[now] + f[now, now])
        crossed = 2 * (f - f[:, now] - f[now] + f[np.ix_(now, now)])
        gains: Form = np.where(np.eye(len(f), dtype=bool), alone, alone[:, None] + alone[None] + crossed)
        return gains

    def _fitting(self, at: NDArray[np.int64], limits: Limits) -> NDArray[np.bool_]:
        """Which of them may be switched to, and fit."""
        one = np.eye(len(self.form), dtype=bool)
        apart = (self.place[:, None] != self.place[None]) | one
        held: NDArray[np.bool_] = apart & self.is_open[:, None] & self.is_open[None]
        for resource, most in limits.items():
            cost, original = self.costs[resource], self.menu.original[resource]
            more = cost - cost[at[self.place]]
            both = np.where(one, more[:, None], more[:, None] + more[None])
            held &= original + cost[at].sum() + both <= most + ROOM * abs(original)
        return held
