"""The search itself, on numbers alone: which picks of a menu diverge least within limits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attnopt.errors import PolicyError
from attnopt.policy_search.additive import Additive
from attnopt.policy_search.influences import At, chosen, completed, kinds_of
from attnopt.policy_search.judge import EndError, Judge
from attnopt.policy_search.knapsack import best_picks
from attnopt.policy_search.menu import Limits, Menu, Picks, shown
from attnopt.policy_search.swaps import neighbours, single_switches

LEVELS = 6  # budgets of the front, beside the one that is asked for
OFFSPRING = 12  # of a generation
STAGES = (0.25, 0.5, 1.0)  # shares of the data on which a generation is judged, each time a third of it left
DRAWN = 4  # of a generation, those that a draw of the fitted sum calls best
ALONE = 0.5  # share of the data on which each alternative is judged alone
SINGLES = 0.4  # of the evaluations, at most, for that
REFITTED = 3  # of the best, those that are fitted once more
PATIENCE = 4  # generations without any gain before the search ends


@dataclass
class Engine:
    """``uniform``: the same alternative everywhere, which always compete.  ``limits``: those that are asked for."""

    menu: Menu
    judge: Judge
    limits: Limits
    uniform: Sequence[Picks]
    seed: int = 0
    # Of the same picks and a last number: in which of so many ways their output projections are fitted once more.
    refits: Judge | None = None
    fits: int = 1
    stage: Callable[[str], None] = lambda name: None
    influence: list[list[float]] = field(default_factory=list)
    guessed: set[At] = field(default_factory=set)  # alternatives whose influence was not measured

    @property
    def spent(self) -> float:
        """Evaluations."""
        return sum(judge.spent for judge in self._judges)

    @property
    def policies(self) -> int:
        """That were judged on all data."""
        return sum(len(judge.full) for judge in self._judges)

    @property
    def _judges(self) -> list[Judge]:
        return [judge for judge in (self.judge, self.refits) if judge is not None]

    def recall(self) -> None:
        """Take in what was known before on all data, of searches with other budgets: with a larger one nothing gets worse."""
        for judge in self._judges:
            judge.recall()

    def run(self) -> bool:
        """Whether the search came to its end.  Raises PolicyError if nothing meets the limits."""
        self.menu.require(self.limits)
        self.prepare()
        self.stage("uniform policies")
        self.judge.value(self.original)
        self._start()
        self.judge.is_limited = True
        few = self.menu.count <= self.judge.limit - self.judge.spent
        ended = self._ends(self._everything if few else self._search)
        return self._ends(self._refit) and ended

    def _ends(self, stage: Callable[[], None]) -> bool:
        """Whether it comes to its end."""
        try:
            stage()
        except EndError:
            return False
        return True

    def prepare(self) -> None:
        """No influence is known yet but that of leaving everything as it is."""
        self.influence = [
            [0.0 if a == 0 else math.inf for a in range(self._alternatives(u))] for u in range(self.menu.places)
        ]

    @property
    def original(self) -> Picks:
        return (0,) * self.menu.places

    def best(self, limits: Limits) -> Picks | None:
        """Of all that were judged on all data and fit, the best; the first of equals."""
        return min(self._fitting(limits), key=self.value, default=None)

    def value(self, picks: Picks) -> float:
        """Of picks that were judged on all data, the best of all ways."""
        return self.value_with(picks, self.refit_of(picks))

    def value_with(self, picks: Picks, refit: int | None) -> float:
        """Of picks that were judged on all data, with this fit or none."""
        return self.judge.full[picks] if refit is None else self._refitted(picks)[refit]

    def refit_of(self, picks: Picks) -> int | None:
        """The number of the fit with which they are best; None without any."""
        values = self._refitted(picks)
        best = min(range(self.fits), key=values.__getitem__)
        return best if values[best] < self.judge.full[picks] else None

    def _refitted(self, picks: Picks) -> list[float]:
        """With each of the fits, infinite where it was not judged."""
        full = {} if self.refits is None else self.refits.full
        return [full.get((*picks, n), math.inf) for n in range(self.fits)]

    def _fitting(self, limits: Limits) -> list[Picks]:
        return [p for p in self.judge.full if self.is_offered(p) and self.menu.fits(p, limits)]

    def front(self) -> list[Picks]:
        """What was judged on all data and is the best for its cost of the first resource, by increasing cost; within the limits
        of the others."""
        first, *others = self.limits
        held = {r: self.limits[r] for r in others}
        offered = [p for p in self.judge.full if self.is_offered(p) and self.menu.fits(p, held)]
        found: list[Picks] = []
        for p in sorted(offered, key=lambda p: (self.menu.cost(first, p), self.value(p), p)):
            if not found or self.value(p) < self.value(found[-1]):
                found.append(p)
        return found

    def is_offered(self, picks: Picks) -> bool:
        return all(a in own for a, own in zip(picks, self.menu.allowed, strict=True))

    def _alternatives(self, place: int) -> int:
        return len(next(iter(self.menu.changes.values()))[place])

    def _start(self) -> None:
        """What always competes, or at least something that fits."""
        fitting = [p for p in self.uniform if self.menu.fits(p, self.limits)]
        if not fitting:
            fitting = [self._cheapest()]
        self.judge.values(fitting)

    def _cheapest(self) -> Picks:
        """Something that meets all limits together."""
        zeros = [[0.0] * self._alternatives(u) for u in range(self.menu.places)]
        found = best_picks(zeros, self.menu, self.limits)
        if found is None:
            raise_apart(self.menu, self.limits)
        assert found is not None
        return found

    def _refit(self) -> None:
        """The best few, and the best of what is the same everywhere: a fit helps some more than others.  Then the other fits, of
        the best."""
        if self.refits is None:
            return
        self.stage("refits")
        self.refits.is_limited = True
        ranked = sorted(self._fitting(self.limits), key=lambda p: self.judge.full[p])
        uniform = [p for p in ranked if p in self.uniform]
        for picks in dict.fromkeys([*ranked[:REFITTED], *uniform[:1]]):
            if any(picks):
                self.refits.value((*picks, 0))
        best = self.best(self.limits)
        if best is not None and any(best):
            self.refits.values([(*best, n) for n in range(self.fits)])

    def _everything(self) -> None:
        self.stage("every policy")
        self.judge.values(list(self.menu.every()))

    def _search(self) -> None:
        self.stage("single choices")
        self.alone(SINGLES * (self.judge.limit - self.judge.spent))
        self.stage("knapsacks")
        levels = self._levels()
        for limits in levels:
            self._try(best_picks(self.influence, self.menu, limits))
        self._try(best_picks(self._fitted().table(), self.menu, self.limits))
        self.stage("swaps")
        self._improve()
        self.stage("other budgets")
        for limits in levels:
            self._try(best_picks(self._fitted().table(), self.menu, limits))

    def _try(self, picks: Picks | None) -> None:
        if picks is not None:
            self.judge.value(picks)

    def alone(self, most: float = math.inf) -> None:
        """The influence of each alternative that is chosen at one place alone.

        With more than ``most`` evaluations, of some of them, from which that of the others follows."""
        kinds = kinds_of(self.menu, self.uniform)
        room = min(most * self.judge.pieces, len(kinds) * self.judge.pieces)
        pieces = max(1, min(math.ceil(ALONE * self.judge.pieces), int(room / max(1, len(kinds)))))
        measured = chosen(self.menu, max(1, int(room / pieces)))
        base = self.judge.value(self.original, pieces)
        singles = [tuple(a if v == u else 0 for v in range(self.menu.places)) for u, a in measured]
        values = self.judge.values(singles, pieces)
        known = {at: value - base for at, value in zip(measured, values, strict=True)}
        self.guessed = {*kinds} - {*known}
        for (u, a), value in completed(known, kinds).items():
            self.influence[u][a] = value

    def _fitted(self) -> Additive:
        tried = list(self.judge.full.items())
        return Additive(self.influence, tried, self.judge.full[self.original], self.guessed)

    def _levels(self) -> list[dict[str, float]]:
        """The limits that are asked for, and others on the way from the least possible cost to that of the original."""
        found: list[dict[str, float]] = [dict(self.limits)]
        first = next(iter(self.limits))
        least, most = self.menu.least(first), max(self.menu.original[first], self.limits[first])
        for n in range(1, LEVELS + 1):
            found.append({**self.limits, first: least + (most - least) * n / (LEVELS + 1)})
        return found

    def _improve(self) -> None:
        """Generations of picks beside the best, until no more is gained."""
        draw, idle = random.Random(self.seed), 0
        while idle < PATIENCE:
            before = self.best(self.limits)
            assert before is not None
            offspring = self._offspring(before, draw)
            if not offspring:
                return
            for picks in self._survivors(offspring):
                self.judge.value(picks)
            after = self.best(self.limits)
            idle = 0 if after != before else idle + 1

    def _offspring(self, best: Picks, draw: random.Random) -> list[Picks]:
        """New picks: those that draws of the fitted sum call best, and of many beside the best those that it prefers."""
        fitted = self._fitted()
        tables = [fitted.table(None if n == 0 else draw) for n in range(DRAWN)]
        found = [p for t in tables if (p := best_picks(t, self.menu, self.limits)) is not None]
        beside = {*neighbours(best, self.menu, self.limits, draw, 8 * OFFSPRING)}
        beside |= {*single_switches(best, self.menu, self.limits)}
        ranked = sorted(beside, key=lambda p: (fitted.value(p), p))
        new = [p for p in dict.fromkeys([*found, *ranked]) if p not in self.judge.full]
        return new[:OFFSPRING]

    def _survivors(self, offspring: Sequence[Picks]) -> list[Picks]:
        """Successive halving of the offspring on more and more of the data."""
        counts = sorted({max(1, math.ceil(share * self.judge.pieces)) for share in STAGES})
        left = list(offspring)
        for count in counts:
            values = self.judge.values(left, count)
            ranked = sorted(zip(values, left, strict=True))
            left = [p for _, p in ranked[: max(1, math.ceil(len(left) / 3))]]
        return left


def raise_apart(menu: Menu, limits: Limits) -> None:
    """Raises PolicyError for limits that each alone can be met, and not together."""
    told = []
    for r in limits:
        others = {name: most for name, most in limits.items() if name != r}
        costs = [list(t) for t in menu.changes[r]]
        picks = best_picks(costs, menu, others)
        if picks is not None:
            told.append(f"{r} {shown(r, menu.cost(r, picks), menu.original[r])} within the others")
    listed = ": the least possible is " + "; ".join(told) if told else ""
    raise PolicyError(f"search: no policy of these choices meets all limits together{listed}", hint="raise one of them")
