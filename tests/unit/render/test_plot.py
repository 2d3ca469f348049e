"""Figures show the numbers that they are given."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import tiny_models
from matplotlib import pyplot

import attnopt
from attnopt import plot
from attnopt.compiler.head_results import HeadProfile
from attnopt.errors import AttnoptError
from attnopt.ir.curves import Curves
from attnopt.patterns import Causal, PerHead, Window
from attnopt.plot import Point
from attnopt.report.report import Report

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def no_open_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def report() -> Report:
    model, args = tiny_models.causal()
    return attnopt.optimize(model.eval(), "fuse", args).report


def test_a_pattern_is_its_mask() -> None:
    ax = plot.pattern("Causal() & Window(left=3, right=0)", 16, 24)
    mask = (Causal() & Window(3, 0)).mask(16, 24)[0].numpy()
    np.testing.assert_array_equal(ax.images[0].get_array(), mask)
    assert ax.get_title() == "Causal() & Window(left=3, right=0)"


def test_a_pattern_per_head_is_the_mean_or_one_head() -> None:
    shown = PerHead({0: Window(0), 1: Causal()})
    masks = shown.mask(8, 8).numpy()
    np.testing.assert_allclose(plot.pattern(shown, 8).images[0].get_array(), masks.mean(0))
    np.testing.assert_array_equal(plot.pattern(shown, 8, head=1).images[0].get_array(), masks[1])


def test_importance_has_a_row_for_each_attention(report: Report) -> None:
    scores = {"a": (1.0, 4.0, 2.0), "": (0.0, 0.0)}
    ax = plot.importance(scores)
    np.testing.assert_array_equal(ax.images[0].get_array().filled(np.nan), [[0.25, 1, 0.5], [0, 0, np.nan]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "(root)"]
    held = report.with_importance({"layers.1": (1.0, 2.0)})
    assert plot.importance(held).images[0].get_array().shape == (1, 2)


def profile() -> HeadProfile:
    curves = {"a": Curves("key", (0, 1, 2), ((0.5, 0.3, 0.2), (1, 0, 0))), "": Curves("key", (0, 1), ((0.1, 0.9),))}
    return HeadProfile("sink-mass", curves, {"a": (0, 3), "": (1,)})


def test_a_profile_is_lines_of_one_site_or_rows_of_all() -> None:
    ax = plot.profile(profile(), "a")
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines], [[0.5, 0.3, 0.2], [1, 0, 0]])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "3"]
    assert (ax.get_title(), ax.get_xlabel()) == ("a", "key")
    ax = plot.profile(profile())
    rows = ax.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(rows, [[0.5, 0.3, 0.2], [1, 0, 0], [0.1, 0.9, np.nan]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a 0", "a 3", "(root) 1"]
    with pytest.raises(AttnoptError, match="the profile has no site 'b'"):
        plot.profile(profile(), "b")


def test_scores_by_depth_are_means_with_a_band() -> None:
    ax = plot.depth({"a": (1.0, 4.0), "": (0.0, 2.0)})
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2.5, 1.0])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "(root)"]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.0, 4.0)


def test_errors_are_bars(report: Report) -> None:
    ax = plot.errors(report)
    assert [bar.get_width() for bar in ax.patches] == [max(site.error or 0.0, 1e-12) for site in report.sites]
    assert ax.get_xscale() == "log"


def test_the_front_is_what_nothing_beats() -> None:
    points = [Point(3, 1, "c"), Point(1, 5, "a"), Point(2, 5, "beaten"), Point(2, 2, "b"), Point(4, 1, "beaten too")]
    assert [p.label for p in plot.front(points)] == ["a", "b", "c"]
    ax = plot.pareto(points, xlabel="FLOPs")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2, 3])
    assert ax.get_xlabel() == "FLOPs"


def test_it_draws_where_it_is_told() -> None:
    _, axes = pyplot.subplots(1, 2)
    assert plot.pattern(Causal(), 4, ax=axes[1]) is axes[1]
    assert not axes[0].images


def test_nothing_to_draw_is_told(report: Report) -> None:
    unmeasured = replace(report, sites=tuple(replace(site, error=None) for site in report.sites))
    for draw in (
        lambda: plot.depth({}),
        lambda: plot.importance(report),
        lambda: plot.errors(unmeasured),
        lambda: plot.pareto([]),
    ):
        with pytest.raises(AttnoptError, match="no"):
            draw()


@pytest.mark.subprocess
def test_matplotlib_is_imported_when_something_is_drawn() -> None:
    code = "import sys, attnopt.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AttnoptError, match=r"attnopt\[plot\]"):
        plot.pattern(Causal(), 4)
