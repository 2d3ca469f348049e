"""Picks beside others: some places switch, and others make up for the cost, as in EvoPress (arXiv:2410.14649)."""

from __future__ import annotations

import random
from collections.abc import Iterator

from attnopt.policy_search.menu import Limits, Menu, Picks

TRIES = 20  # switches that make up for the cost of one


def switched(picks: Picks, menu: Menu, limits: Limits, draw: random.Random) -> Picks | None:
    """One to three switches, and as many others as the limits ask for; None if that leads nowhere."""
    open_places = [u for u in range(menu.places) if len(menu.allowed[u]) > 1]
    if not open_places:
        return None
    made, moved = list(picks), set[int]()
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        u = draw.choice(open_places)
        made[u] = draw.choice([a for a in menu.allowed[u] if a != made[u]])
        moved.add(u)
    for _ in range(TRIES):
        now = tuple(made)
        over = [r for r, most in limits.items() if not menu.fits(now, {r: most})]
        if not over:
            return None if now == picks else now
        table = menu.changes[draw.choice(over)]
        cheaper = [
            (u, a) for u in open_places for a in menu.allowed[u] if u not in moved and table[u][a] < table[u][made[u]]
        ]
        if not cheaper:
            return None
        u, a = draw.choice(cheaper)
        made[u] = a
        moved.add(u)
    return None


def neighbours(picks: Picks, menu: Menu, limits: Limits, draw: random.Random, count: int) -> Iterator[Picks]:
    """Up to ``count`` different picks that fit."""
    found: set[Picks] = {picks}
    for _ in range(4 * count):
        made = switched(picks, menu, limits, draw)
        if made is not None and made not in found:
            found.add(made)
            yield made
            if len(found) > count:
                return


def single_switches(picks: Picks, menu: Menu, limits: Limits) -> Iterator[Picks]:
    """All picks that differ at one place, and fit."""
    for u, own in enumerate(menu.allowed):
        for a in own:
            made = (*picks[:u], a, *picks[u + 1 :])
            if a != picks[u] and menu.fits(made, limits):
                yield made
