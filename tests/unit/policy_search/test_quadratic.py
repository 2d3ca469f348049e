"""The least of a sum over pairs of choices, against brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest

from attnopt.policy_search.menu import Menu, Picks
from attnopt.policy_search.quadratic import Form, Quadratic


def menu(places: int = 5, alternatives: int = 4, seed: int = 0) -> Menu:
    draw = random.Random(seed)
    saved = [[-10.0 * a * draw.uniform(0.6, 1.4) for a in range(alternatives)] for _ in range(places)]
    size = [[-7.0 * draw.choice([0, 1, 2]) if a else 0.0 for a in range(alternatives)] for _ in range(places)]
    changes = {"flops": tuple(map(tuple, saved)), "kv_bytes": tuple(map(tuple, size))}
    return Menu({"flops": 60.0 * places, "kv_bytes": 20.0 * places}, changes, (tuple(range(alternatives)),) * places)


def form(m: Menu, seed: int, shared: float = 1.0) -> Form:
    """Of shifts that grow with what is saved, with a direction that they share."""
    draw = np.random.default_rng(seed)
    common, rows = draw.normal(size=6), []
    for own in m.allowed:
        for a in own:
            rows.append(a * draw.uniform(0.3, 2.0) * (draw.normal(size=6) + shared * common * draw.choice([-1, 1])))
    return np.array(rows) @ np.array(rows).T


def limits(m: Menu, share: float, *resources: str) -> dict[str, float]:
    return {r: m.least(r) + share * (m.original[r] - m.least(r)) for r in resources or ("flops",)}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("resources", [("flops",), ("flops", "kv_bytes")])
def test_within_two_percent_of_brute_force(seed: int, resources: tuple[str, ...]) -> None:
    m = menu(seed=seed)
    sums, most = Quadratic(form(m, seed), m), limits(m, 0.4, *resources)
    fitting = [p for p in m.every() if m.fits(p, most)]
    draw = random.Random(seed)
    got = sums.least(most, draw.sample(fitting, 3))
    assert got is not None
    assert m.fits(got, most)
    assert sums.value(got) <= 1.02 * min(map(sums.value, fitting))


def test_pairs_decide() -> None:
    """Alone the first alternatives move the outputs less; together they add up, and the second ones cancel."""
    m = Menu({"flops": 10.0}, {"flops": ((0.0, -2.0, -2.0),) * 2}, ((0, 1, 2),) * 2)
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.5], [0.0, 0.0], [1.0, 0.0], [0.0, -1.5]])
    assert Quadratic(rows @ rows.T, m).least({"flops": 6.0}, []) == (2, 2)
    alone = np.diag((rows**2).sum(1))
    assert Quadratic(alone, m).least({"flops": 6.0}, []) == (1, 1)


def test_values_are_sums_over_pairs() -> None:
    m = menu(3, 3)
    f = form(m, 1)
    p: Picks = (1, 0, 2)
    assert Quadratic(f, m).value(p) == pytest.approx(sum(f[i, j] for i in (1, 3, 8) for j in (1, 3, 8)))


def test_what_is_infinite_or_not_allowed_is_never_switched_to() -> None:
    m = menu(3, 3)
    m = Menu(m.original, m.changes, ((0, 1, 2), (1, 2), (0, 1, 2)))
    f = form(menu(3, 3), 2)
    f[2, 2] = np.inf
    got = Quadratic(f, m).least(limits(m, 0.3), [])
    assert got is not None
    assert got[0] != 2
    assert got[1] in (1, 2)


def test_of_one_place_and_of_limits_that_nothing_meets() -> None:
    m = menu(1, 4)
    f = np.diag([0.0, 3.0, 1.0, 9.0])
    assert Quadratic(f, m).least({"flops": m.cost("flops", (2,))}, [(3,)]) == (2,)
    assert Quadratic(f, m).least({"flops": m.least("flops") - 1.0}, []) is None
