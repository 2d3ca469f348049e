"""What is learned from where outputs move, and that it helps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_quadratic import limits, menu

from attnopt.policy_search.engine import Engine
from attnopt.policy_search.judge import Judge, Part
from attnopt.policy_search.menu import Menu, Picks
from attnopt.policy_search.quadratic import Quadratic
from attnopt.policy_search.shifts import PRIOR, Shifts
from attnopt.policy_search.sketch import SIZE, Sketch, direction

Vector = NDArray[np.float64]


def part(y: Vector, count: float = 2.0) -> Part:
    squared = float(y @ y)
    return Part(squared, count, (y / (squared**0.5 or 1.0)).astype(np.float16))


def single(m: Menu, u: int, a: int) -> Picks:
    return tuple(a if v == u else 0 for v in range(m.places))


def vectors(m: Menu, seed: int) -> dict[tuple[int, int], Vector]:
    """Of each alternative alone: half along a direction that all share, forwards or backwards."""
    draw = np.random.default_rng(seed)
    common = draw.normal(size=8)
    return {
        (u, a): 0.1 * a * draw.uniform(0.5, 1.5) * (draw.normal(size=8) + common * draw.choice([-1.0, 1.0]))
        for u, own in enumerate(m.allowed) for a in own
    }  # fmt: skip


def moved(own: dict[tuple[int, int], Vector], p: Picks) -> Vector:
    """Together less than the sum, and a little elsewhere."""
    y = np.sum([own[u, a] for u, a in enumerate(p)], axis=0)
    return y * (1 - 0.03 * sum(map(bool, p))) + 0.02 * np.sin(np.arange(8) * (1 + sum(p))) * bool(sum(map(bool, p)) > 1)


def test_shifts_of_single_choices_add_up_with_their_directions() -> None:
    m = menu(2, 2)
    one, other = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.6, 0.8, 0.0, 0.0])
    piece = [((0, 1), part(other)), ((1, 0), part(one))]
    fitted = Quadratic(Shifts([[0.0, 0.5], [0.0, 0.5]], [piece]).form(), m)
    assert fitted.value((1, 1)) == pytest.approx((3.2 + 2 * PRIOR**2) / 2, rel=1e-3)
    assert fitted.value((1, 0)) == pytest.approx((1.0 + PRIOR**2) / 2, rel=1e-3)


def test_what_was_not_tried_alone_adds_by_its_influence() -> None:
    m = menu(3, 2)
    piece = [((1, 0, 0), part(np.array([2.0, 0.0])))]
    fitted = Quadratic(Shifts([[0.0, 2.0], [0.0, 0.7], [0.0, 0.4]], [piece, []]).form(), m)
    assert fitted.value((0, 1, 1)) == pytest.approx((1 + PRIOR**2) * 1.1)
    assert fitted.value((1, 1, 0)) == pytest.approx((1 + PRIOR**2) * 2.7, rel=1e-3)


def test_what_was_tried_together_corrects_the_sum() -> None:
    """Together they cancel, which neither tells alone; where the first is chosen with the third, too."""
    m = menu(3, 2)
    y = np.array([1.0, 0.0])
    alone = [((0, 0, 1), part(np.array([0.0, 1.0]))), ((0, 1, 0), part(y)), ((1, 0, 0), part(y))]
    influence = [[0.0, 0.5]] * 3
    before = Quadratic(Shifts(influence, [alone]).form(), m)
    after = Quadratic(Shifts(influence, [[*alone, ((1, 1, 0), part(0.1 * y))]]).form(), m)
    assert before.value((1, 1, 0)) == pytest.approx((4.0 + 2 * PRIOR**2) / 2, rel=1e-3)
    assert after.value((1, 1, 0)) < 0.2 * before.value((1, 1, 0))
    assert after.value((1, 1, 1)) < 0.6 * before.value((1, 1, 1))
    assert after.value((0, 0, 1)) > 0.3 * before.value((0, 0, 1))


def test_what_must_not_be_chosen_stays_infinite() -> None:
    piece = [((1, 0), part(np.array([1.0])))]
    form = Shifts([[0.0, 0.5], [0.0, np.inf]], [piece]).form()
    assert np.flatnonzero(~np.isfinite(form.diagonal())).tolist() == [3]
    assert np.isfinite(form[:3, :3]).all()


def least_found(m: Menu, seed: int, is_directed: bool, evaluations: int) -> tuple[float, float]:
    """What a search finds on two pieces of data, and the least there is."""
    own = [vectors(m, seed), vectors(m, seed + 50)]
    most = limits(m, 0.45)

    def measure(p: Picks, pieces: list[int]) -> list[Part]:
        parts = [part(moved(own[n], p)) for n in pieces]
        return parts if is_directed else [x._replace(direction=None) for x in parts]

    engine = Engine(m, Judge(measure, 2, limit=evaluations), most, [(a,) * m.places for a in m.allowed[0]], seed)
    engine.run()
    best = engine.best(most)
    assert best is not None
    every = [sum(x.total for x in measure(p, [0, 1])) / 4 for p in m.every() if m.fits(p, most)]
    return engine.value(best), min(every)


@pytest.mark.parametrize("seed", [2, 3])
def test_directions_lead_to_within_two_percent_of_brute_force(seed: int) -> None:
    found, least = least_found(menu(5, 5), seed, True, 60)
    assert found <= 1.02 * least


def test_values_alone_lead_less_far() -> None:
    """With as many evaluations, of what directions lead to."""
    found, least = least_found(menu(5, 5), 2, False, 60)
    assert found > 1.2 * least


# ------------------------------------------------------------ sketches
def sketched(x: torch.Tensor, seed: int = 0, step: int = 1000) -> torch.Tensor:
    sketch = Sketch.of(*x.shape, seed, x.device)
    to = sketch.start()
    for i in range(0, len(x), step):
        sketch.add(to, x[i : i + step], i)
    return to


def test_a_small_matrix_is_kept_as_it_is() -> None:
    x = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    assert sketched(x, step=2)[:12].tolist() == x.flatten().tolist()
    assert len(direction(sketched(x))) == SIZE


@pytest.mark.parametrize("kind", ["random", "alike in each row"])
def test_angles_and_lengths_are_kept_nearly(kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    rows = 1 if kind == "alike in each row" else 60
    xs = [torch.randn(rows, 300, generator=g, dtype=torch.float64).expand(60, 300) for _ in range(3)]
    xs.append(xs[0] + 0.5 * xs[1])
    for seed in range(3):
        small = [sketched(x, seed, 7) for x in xs]
        for (x, y), (a, b) in zip(itertools.combinations(xs, 2), itertools.combinations(small, 2), strict=True):
            assert float(a @ b) == pytest.approx(float((x * y).sum()), abs=0.35 * float(x.norm() * y.norm()))
