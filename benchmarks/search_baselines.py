"""What `attnopt.search` is compared with, on the same choices, costs and data: numbers alone."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from attnopt.policy_search.engine import OFFSPRING, PATIENCE, STAGES, Engine
from attnopt.policy_search.judge import EndError
from attnopt.policy_search.knapsack import best_picks
from attnopt.policy_search.menu import Limits, Menu, Picks, Table
from attnopt.policy_search.swaps import switched

REPAIRING = ("uniform, refitted", "search")  # their output projections are fitted once more in the end
OF_ONE = ", one family"  # of passes, as the papers have it: the best of all families
CHOOSING = ("sum of single choices", "greedy hull", "EvoPress")
METHODS = ("uniform", *(f"{m}{OF_ONE}" for m in CHOOSING), *CHOOSING, "search without refits", *REPAIRING)


def found_by(method: str, engine: Engine) -> Picks | None:
    """What this method finds.  ``engine`` has the choices, the limits, the data and the most evaluations.

    Influences and uniform policies count as evaluations for those that use them."""
    if method.startswith("search"):
        engine.run()
        return engine.best(engine.limits)
    engine.judge.is_limited = method == "EvoPress"
    if method == "EvoPress":
        return evopress(engine)
    if method.startswith("uniform"):
        picks = _uniform(engine)
        if picks is not None and engine.refits is not None:
            engine.refits.value((*picks, 0))
        return picks
    engine.judge.value(engine.original)
    engine.prepare()
    engine.alone()
    if method == "greedy hull":
        return hull(engine.influence, engine.menu, engine.limits)
    return best_picks(engine.influence, engine.menu, engine.limits)


def of_one_family(menu: Menu, families: Sequence[Sequence[Collection[str]]]) -> list[Menu]:
    """The menu without alternatives of other passes, for each pass.  ``families``: the passes of each place's alternatives."""
    names = dict.fromkeys(name for own in families for passes in own for name in passes)
    return [
        replace(
            menu,
            allowed=tuple(
                tuple(a for a in allowed if {*own[a]} <= {name})
                for allowed, own in zip(menu.allowed, families, strict=True)
            ),
        )
        for name in names
    ]


def _uniform(engine: Engine) -> Picks | None:
    fitting = [p for p in engine.uniform if engine.is_offered(p) and engine.menu.fits(p, engine.limits)]
    return min(fitting, key=engine.judge.value, default=None)


def hull(influence: Table, menu: Menu, limits: Limits) -> Picks | None:
    """LU-KV's greedy: step by step the alternative on the lower convex hull of its place that loses least for what it saves
    of the first resource."""
    table = menu.changes[next(iter(limits))]
    picks = [0] * menu.places
    hulls = [_hull(table[u], influence[u], own) for u, own in enumerate(menu.allowed)]
    while not menu.fits(tuple(picks), limits):
        steps = [
            ((influence[u][b] - influence[u][a]) / (table[u][a] - table[u][b]), u, b)
            for u, (a, own) in enumerate(zip(picks, hulls, strict=True))
            for b in own[own.index(a) + 1 :][:1]
        ]
        if not steps:
            return None
        _, u, b = min(steps)
        picks[u] = b
    return tuple(picks)


def _hull(costs: Sequence[float], values: Sequence[float], allowed: Sequence[int]) -> list[int]:
    """From what costs most to what costs least, each step loses more for what it saves than the one before."""
    found = [0]
    while True:
        at = found[-1]
        ahead = [b for b in allowed if costs[b] < costs[at] - 1e-12]
        if not ahead:
            return found
        slope = {b: (values[b] - values[at]) / (costs[at] - costs[b]) for b in ahead}
        found.append(min(ahead, key=lambda b: (slope[b], costs[b])))


def evopress(engine: Engine) -> Picks | None:
    """(1 + lambda) evolution by level switches from the best uniform policy (arXiv:2410.14649), with as many evaluations."""
    best, draw = _start(engine), random.Random(engine.seed)
    spent, idle = engine.judge.spent, 0
    try:
        while best is not None and idle < PATIENCE:
            offspring = list(_switches(best, engine, draw))
            if not offspring:
                break
            for share in STAGES:
                pieces = max(1, round(share * engine.judge.pieces))
                ranked = sorted(offspring, key=lambda p: engine.judge.value(p, pieces))
                offspring = ranked[: max(1, len(ranked) // 3)]
            best = min([best, *offspring], key=engine.judge.value)
            idle = idle + 1 if engine.judge.spent == spent else 0  # few policies: all of them are known
            spent = engine.judge.spent
    except EndError:
        return engine.best(engine.limits)
    return best


def _start(engine: Engine) -> Picks | None:
    engine.judge.is_limited = False
    found = _uniform(engine)
    if found is None:
        zeros = [[0.0] * len(own) for own in next(iter(engine.menu.changes.values()))]
        found = best_picks(zeros, engine.menu, engine.limits)
    if found is not None:
        engine.judge.value(found)
    engine.judge.is_limited = True
    return found


def _switches(best: Picks, engine: Engine, draw: random.Random) -> Iterator[Picks]:
    """As many offspring as a generation has, if there are."""
    made = (switched(best, engine.menu, engine.limits, draw) for _ in range(20 * OFFSPRING))
    yield from islice((p for p in made if p is not None), OFFSPRING)
