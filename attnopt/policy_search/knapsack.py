"""One alternative for each place, of the least value in all, within limits: a multiple-choice knapsack, solved by HiGHS."""

from __future__ import annotations

import math

import numpy as np

from attnopt.errors import AttnoptError
from attnopt.policy_search.menu import Limits, Menu, Picks, Table

SECONDS = 10.0  # of one solution, which is then the best that was found


def best_picks(values: Table, menu: Menu, limits: Limits) -> Picks | None:
    """The picks with the least sum of ``values``; infinite ones are not chosen.  None if nothing fits.

    Ties are those of HiGHS, which is deterministic."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise AttnoptError("attnopt.search needs scipy", hint='pip install "attnopt[search]"') from error
    columns = [(u, a) for u, own in enumerate(menu.allowed) for a in own if math.isfinite(values[u][a])]
    if len({u for u, _ in columns}) < menu.places:
        return None
    worth = np.array([values[u][a] for u, a in columns])
    worth = worth / (np.abs(worth).max() or 1.0)  # HiGHS's tolerances are absolute
    one_each = np.array([[float(u == place) for u, _ in columns] for place in range(menu.places)])
    held = [LinearConstraint(one_each, 1.0, 1.0)]
    for resource, most in limits.items():
        scale = abs(menu.original[resource]) or 1.0
        row = np.array([menu.changes[resource][u][a] for u, a in columns]) / scale
        held.append(LinearConstraint(row[None], -np.inf, (most - menu.original[resource]) / scale))
    found = milp(
        worth,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=held,
        options={"mip_rel_gap": 1e-6, "time_limit": SECONDS},
    )
    if found.x is None:
        return None
    chosen = {u: a for (u, a), x in zip(columns, found.x, strict=True) if x > 0.5}
    picks = tuple(chosen[u] for u in range(menu.places))
    return picks if menu.fits(picks, limits) else None
