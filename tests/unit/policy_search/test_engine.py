"""The search on numbers alone: against brute force, uniform picks and larger budgets."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from attnopt.errors import PolicyError
from attnopt.policy_search.additive import Additive
from attnopt.policy_search.engine import Engine
from attnopt.policy_search.influences import chosen, completed, kinds_of
from attnopt.policy_search.judge import EndError, Judge, Part
from attnopt.policy_search.knapsack import best_picks
from attnopt.policy_search.menu import Menu, Picks
from attnopt.policy_search.swaps import neighbours


def menu(places: int = 4, alternatives: int = 5, seed: int = 0) -> Menu:
    """Alternatives of rising savings."""
    draw = random.Random(seed)
    cost = [[-10.0 * a * draw.uniform(0.6, 1.4) for a in range(alternatives)] for _ in range(places)]
    size = [[-7.0 * draw.choice([0, 1, 2]) if a else 0.0 for a in range(alternatives)] for _ in range(places)]
    changes = {"flops": tuple(map(tuple, cost)), "kv_bytes": tuple(map(tuple, size))}
    original = {"flops": 60.0 * places, "kv_bytes": 20.0 * places}
    return Menu(original, changes, (tuple(range(alternatives)),) * places)


def worth(m: Menu, seed: int) -> dict[Picks, float]:
    """Values that are not additive: later places matter less after early ones changed, and some pairs clash."""
    draw = random.Random(100 + seed)
    alone = [[0.0, *sorted(draw.uniform(0.2, 3.0) ** 2 for _ in own[1:])] for own in m.allowed]
    clash = {(u, a, v, b): draw.uniform(-0.8, 0.8) for u, own in enumerate(m.allowed) for a in own
             for v, others in enumerate(m.allowed) for b in others if u < v and a and b}  # fmt: skip

    def value(p: Picks) -> float:
        parts = [alone[u][a] * 0.8 ** sum(map(bool, p[:u])) for u, a in enumerate(p)]
        pairs = [
            clash[u, p[u], v, p[v]] * math.sqrt(parts[u] * parts[v])
            for u in range(len(p)) for v in range(u + 1, len(p)) if p[u] and p[v]
        ]  # fmt: skip
        return max(0.0, sum(parts) + sum(pairs)) ** 1.1

    return {p: value(p) for p in m.every()}


def searched(m: Menu, of: dict[Picks, float], limits: dict[str, float], seed: int = 0, **options: Any) -> Engine:
    judge = Judge(lambda p, pieces: [(of[p], 1.0) for _ in pieces], 1, **options)
    engine = Engine(m, judge, limits, [(a,) * m.places for a in range(len(m.allowed[0]))], seed)
    engine.run()
    return engine


def limit(m: Menu, share: float, resource: str = "flops") -> dict[str, float]:
    least, most = m.least(resource), m.original[resource]
    return {resource: least + share * (most - least)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.15, 0.4, 0.7])
def test_within_two_percent_of_brute_force(seed: int, share: float) -> None:
    m = menu(seed=seed)
    of, limits = worth(m, seed), limit(m, share)
    assert len(of) == 625
    engine = searched(m, of, limits, limit=120)
    best = engine.best(limits)
    assert best is not None
    assert of[best] <= 1.02 * min(v for p, v in of.items() if m.fits(p, limits)) + 1e-9
    assert engine.judge.spent <= 125 + 5


@pytest.mark.parametrize("seed", range(4))
def test_several_limits_hold_together(seed: int) -> None:
    m = menu(seed=seed)
    of, limits = worth(m, seed), limit(m, 0.4) | limit(m, 0.5, "kv_bytes")
    engine = searched(m, of, limits, limit=150)
    best = engine.best(limits)
    assert best is not None
    assert all(m.cost(r, best) <= most + 1e-6 for r, most in limits.items())
    assert of[best] <= 1.02 * min(v for p, v in of.items() if m.fits(p, limits)) + 1e-9


@pytest.mark.parametrize("evaluations", [1, 3, 8, 20, 60])
def test_never_worse_than_a_uniform_policy_that_fits(evaluations: int) -> None:
    """Not even with hardly any evaluations, and where the sum of influences is of no use."""
    m = menu(8, 4)
    draw = random.Random(3)
    uniform = [(a,) * 8 for a in range(4)]
    limits = limit(m, 0.5)

    class Odd(dict[Picks, float]):
        def __missing__(self, p: Picks) -> float:
            self[p] = 0.0 if sum(map(bool, p)) < 2 else 0.5 if p in uniform else draw.uniform(1, 9)
            return self[p]

    of = Odd()
    engine = searched(m, of, limits, limit=evaluations)
    best = engine.best(limits)
    assert best is not None
    assert of[best] <= min(of[p] for p in uniform if m.fits(p, limits))


def test_the_value_never_rises_with_the_budget() -> None:
    m = menu(seed=5)
    of = worth(m, 5)
    engine = searched(m, of, limit(m, 0.3), limit=80)
    front = engine.front()
    values, costs = [of[p] for p in front], [m.cost("flops", p) for p in front]
    assert len(front) > 3
    assert values == sorted(values, reverse=True)
    assert costs == sorted(costs)
    found = []
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        limits = limit(m, share)
        best = searched(m, of, limits, limit=120).best(limits)
        assert best is not None
        found.append(of[best])
    assert found == sorted(found, reverse=True)


def test_the_same_seed_goes_the_same_way() -> None:
    m = menu(10, 4)
    asked: list[list[Picks]] = []
    for seed in (1, 1, 2):
        way: list[Picks] = []

        def value(p: Picks, pieces: Sequence[int], way: list[Picks] = way) -> list[Part]:
            way.append(p)
            return [(sum(a * (u + 1) for u, a in enumerate(p)) + 0.3 * math.sin(hash(p) % 7), 1.0)]

        Engine(m, Judge(value, 1, limit=90), limit(m, 0.4), [], seed).run()
        asked.append(way)
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_offspring_are_halved_on_part_of_the_data() -> None:
    m = menu(10, 4)
    pieces: dict[Picks, set[int]] = {}

    def value(p: Picks, own: Sequence[int]) -> list[Part]:
        pieces.setdefault(p, set()).update(own)
        return [(sum(a * a * (u + 1.0) for u, a in enumerate(p)), 1.0) for _ in own]

    judge = Judge(value, 8, limit=60)
    Engine(m, judge, limit(m, 0.4), []).run()
    counts = {len(own) for own in pieces.values()}
    assert {2, 4, 8} <= counts
    assert judge.spent < len(pieces)
    assert all(own == set(range(len(own))) for own in pieces.values())


def test_parts_are_weighed_by_their_tokens() -> None:
    judge = Judge(lambda p, pieces: [((3.0, 1.0), (1.0, 3.0))[piece] for piece in pieces], 2)
    assert judge.value((0,)) == 1.0
    assert judge.value((0,), 1) == 3.0


@pytest.mark.parametrize("limit", [1, 2.5, 3, 100])
def test_pieces_that_are_measured_together_change_nothing(limit: float) -> None:
    """But how many are asked for at a time: values and where the search ends are the same."""
    found = []
    for together in (1, 2, 3):
        asked: list[int] = []

        def value(p: Picks, pieces: Sequence[int], asked: list[int] = asked) -> list[Part]:
            asked.append(len(pieces))
            return [(p[0] + piece, 1.0) for piece in pieces]

        judge = Judge(value, 4, limit=limit, together=together, is_limited=True)
        with contextlib.suppress(EndError):
            judge.values([(n,) for n in range(5)], 3)
        found.append((judge.asked, judge.known))
        assert len(judge.asked) == min(5 * 3, math.ceil(4 * limit))
        assert max(asked) == min(together, 3)
    assert found[0] == found[1] == found[2]


def test_an_impossible_budget_names_the_least_possible() -> None:
    m = menu()
    least = m.least("flops")
    with pytest.raises(PolicyError) as caught:
        searched(m, worth(m, 0), {"flops": least * 0.9})
    assert f"the least possible is {least:.4g} FLOPs ({least / m.original['flops']:.3g} of the original)" in str(
        caught.value
    )


def test_limits_that_exclude_each_other() -> None:
    changes = {"flops": ((0.0, -9.0, 0.0),), "kv_bytes": ((0.0, 0.0, -9.0),)}
    m = Menu({"flops": 10.0, "kv_bytes": 10.0}, changes, ((0, 1, 2),))
    with pytest.raises(PolicyError, match=r"no policy of these choices meets all limits together: .*flops 10 FLOPs"):
        searched(m, {(0,): 0.0, (1,): 1.0, (2,): 1.0}, {"flops": 5.0, "kv_bytes": 5.0})


def test_a_limit_that_the_original_meets() -> None:
    m = menu()
    of = worth(m, 0)
    assert searched(m, of, {"flops": m.original["flops"]}, limit=30).best({"flops": 1e9}) == (0, 0, 0, 0)


def test_what_may_not_stay_as_it_is_does_not() -> None:
    m = menu(3, 3)
    m = Menu(m.original, m.changes, ((0, 1, 2), (1, 2), (0, 1, 2)))
    limits = limit(m, 0.9)
    best = searched(m, worth(menu(3, 3), 0), limits, limit=40).best(limits)
    assert best is not None
    assert best[1] in (1, 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_is_exact(seed: int) -> None:
    m = menu(5, 4, seed)
    draw = random.Random(seed)
    values = [[draw.uniform(-1, 5) for _ in own] for own in m.allowed]
    limits = limit(m, 0.4) | limit(m, 0.6, "kv_bytes")
    got = best_picks(values, m, limits)

    def total(p: Picks) -> float:
        return sum(v[a] for v, a in zip(values, p, strict=True))

    assert got is not None
    assert total(got) == pytest.approx(min(total(p) for p in m.every() if m.fits(p, limits)))
    values[0] = [math.inf] * 4
    assert best_picks(values, m, limits) is None


def test_neighbours_fit_and_differ() -> None:
    m, draw = menu(6, 4), random.Random(0)
    limits = limit(m, 0.4)
    start = best_picks([[float(a) for a in own] for own in m.allowed], m, limits)
    assert start is not None
    found = list(neighbours(start, m, limits, draw, 40))
    assert len({*found}) == len(found) > 20
    assert all(m.fits(p, limits) and p != start for p in found)


def test_a_fitted_sum_learns_what_influences_alone_do_not_tell() -> None:
    """Together the second place counts double and the first not at all."""
    alone = [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    tried = [((a, b, c), 2.0 * b + c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a + b + c > 1]
    fitted = Additive(alone, tried, 0.0)
    assert Additive(alone, [], 0.0).value((1, 1, 0)) == pytest.approx(2.0)
    assert fitted.value((0, 1, 1)) == pytest.approx(3.0, rel=0.15)
    assert fitted.value((1, 0, 1)) == pytest.approx(1.0, rel=0.4)
    table = fitted.table()
    assert table[1][1] > 2.5 * table[0][1]
    assert fitted.table(random.Random(1)) == fitted.table(random.Random(1)) != fitted.table(random.Random(2))


def test_influences_of_some_follow_from_those_of_others() -> None:
    """Places and kinds that multiply: a third of the table tells the rest."""
    m = menu(12, 7)
    uniform = [(a,) * 12 for a in range(7)]
    true = {(u, a): 0.3 * (1 + u) * a**1.5 for u in range(12) for a in range(1, 7)}
    asked = kinds_of(m, uniform)
    assert {*asked} == {*true}
    measured = chosen(m, 24)
    assert len(measured) == 24
    assert {u for u, _ in measured} == {*range(12)}
    assert {a for _, a in measured} == {*range(1, 7)}
    found = completed({at: true[at] for at in measured}, asked)
    assert all(found[at] == true[at] for at in measured)
    assert all(found[at] == pytest.approx(v, rel=0.3) for at, v in true.items())
    assert len(chosen(m, 5)) <= 6
    assert {*chosen(m, 72)} == {*true}


def test_many_choices_leave_evaluations_for_their_combinations() -> None:
    """Singles alone would take more than there are."""
    m = menu(20, 7)
    judge = Judge(
        lambda p, pieces: [(sum(a**1.3 * (1 + u % 5) for u, a in enumerate(p)), 1.0) for _ in pieces], 3, limit=40
    )
    limits = limit(m, 0.5)
    uniform = [(a,) * 20 for a in range(7)]
    engine = Engine(m, judge, limits, uniform)
    engine.run()
    best = engine.best(limits)
    assert best is not None
    assert judge.full[best] < 0.9 * min(judge.full[p] for p in uniform if m.fits(p, limits))


def test_values_that_are_not_finite_are_never_chosen() -> None:
    m = menu(3, 3)
    of = worth(m, 1)
    for p in of:
        if p[0] == 1:
            of[p] = math.inf
    limits = limit(m, 0.3)
    best = searched(m, of, limits, limit=20).best(limits)
    assert best is not None
    assert math.isfinite(of[best])


def test_a_second_fit_counts_where_it_helps() -> None:
    """It halves the value of all picks but those that seemed best, which it spoils."""
    m = menu(seed=1)
    of, limits = worth(m, 1), limit(m, 0.4)
    plain = searched(m, of, limits, limit=120)
    first = plain.best(limits)
    assert first is not None
    asked: list[Picks] = []

    def again(with_fit: Picks, pieces: Sequence[int]) -> list[Part]:
        *p, fit = with_fit
        asked.append(with_fit)
        of_fit = (0.5, 0.6, 0.4)[fit] * of[tuple(p)]
        return [(9.0 * of[first] if tuple(p) == first else of_fit, 1.0) for _ in pieces]

    judge = Judge(lambda p, pieces: [(of[p], 1.0) for _ in pieces], 1, limit=120)
    uniform = [(a,) * m.places for a in range(len(m.allowed[0]))]
    engine = Engine(m, judge, limits, uniform, refits=Judge(again, 1), fits=3)
    engine.run()
    best = engine.best(limits)
    assert best is not None
    assert best != first
    assert (*first, 0) in asked
    assert len(asked) <= 4 + 2  # the other fits of the best alone
    assert (engine.refit_of(best), engine.refit_of(first)) == (2, None)
    assert engine.value(best) == 0.4 * of[best] < of[first] == engine.value(first)
    assert engine.spent == judge.spent + len(asked)
    values = [engine.value(p) for p in engine.front()]
    assert values == sorted(values, reverse=True)


def test_what_another_budget_found_is_recalled() -> None:
    m, known = menu(seed=2), dict[Picks, dict[int, Part]]()
    of = worth(m, 2)
    found = []
    for share, evaluations in ((0.3, 200), (0.35, 1)):
        limits = limit(m, share)
        judge = Judge(lambda p, pieces: [(of[p], 1.0) for _ in pieces], 1, known, limit=evaluations)
        engine = Engine(m, judge, limits, [])
        engine.run()
        engine.recall()
        best = engine.best(limits)
        assert best is not None
        found.append(of[best])
    assert found[1] <= found[0]
