"""Fits that are to hold beyond the domain of their calibration data: random tokens beside it, and how far other data lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from stacks import batches, stack
from token_readers import BEGIN, Reader, texts
from torch import Tensor, nn

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.compiler.analyze_batches import analyze_batches
from attnopt.compiler.graph_probe import GraphProbe
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.compiler.random_tokens import with_random_tokens
from attnopt.compiler.tied_weights import jointly, tied
from attnopt.fit.kv_sides import Sides
from attnopt.fit.least_squares import LayerMoments
from attnopt.fit.leverage import MeanMoments
from attnopt.ir import activations
from attnopt.ir.interfaces import Pass
from attnopt.ir.site import Site
from attnopt.passes import GroupedQuery, HeadPatch, PruneHeads

pytestmark = pytest.mark.usefixtures("one_capture")


def arranged(model: nn.Module, data: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[CallInputs], GraphProbe]:
    analyzed, given = analyze_batches(model.eval(), attnopt.Calibration.of(data))
    return analyzed.program.module, given, GraphProbe(analyzed.program, analyzed.findings.found, given)


def test_random_tokens_leave_marks_and_everything_else() -> None:
    gm, given, _ = arranged(Reader(), texts(high=200))
    made = with_random_tokens(gm, given, seed=3)
    assert len(made) == 2
    for old, new in zip(given, made, strict=True):
        (ids, places), (drawn, same) = old.args, new.args
        assert torch.equal(places, same)
        assert bool((drawn[:, 0] == BEGIN).all())
        assert drawn.dtype == ids.dtype
        assert float((drawn == ids).double().mean()) < 0.25
    drawn = torch.cat([b.args[0] for b in made])
    assert int(drawn.min()) < 10, "words that no text has"
    assert int(drawn.max()) > 250
    again = with_random_tokens(gm, given, seed=3)
    assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(made, again, strict=True))
    assert not torch.equal(made[0].args[0], with_random_tokens(gm, given, seed=4)[0].args[0])


def test_no_random_tokens_where_none_are_read() -> None:
    gm, given, _ = arranged(stack(), batches())
    assert with_random_tokens(gm, given, 0) == [], "features"
    gm, given, _ = arranged(Reader(words=100), texts())
    assert with_random_tokens(gm, given, 0) == [], "places alone have as many rows as a vocabulary"
    few = [tuple(x[:3] for x in texts()[0])]
    gm, given, _ = arranged(Reader(), few)
    assert with_random_tokens(gm, given, 0) == [], "too few sequences to tell marks from words"


@pytest.mark.parametrize("share", [0.0, 0.5, 1e12])
def test_the_weight_of_random_tokens_is_between_the_data_and_none(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0: what the data say; without bound: what random tokens say; between: the sum, each by its number of tokens."""
    monkeypatch.setattr(activations, "INVENTED", share)
    gm, given, probe = arranged(Reader(), texts())
    random = with_random_tokens(gm, given, 0)[:1]  # half as many tokens
    pairs = zip(sites(gm, probe, given, random), sites(gm, probe, given), sites(gm, probe, random), strict=True)
    for both, own, invented in pairs:
        for got, a, b in zip(*(LayerMoments().of(s) for s in (both, own, invented)), strict=True):
            assert got.tokens == a.tokens
            torch.testing.assert_close(got.zz, a.zz + 2 * share * b.zz)
            torch.testing.assert_close(got.zy, a.zy + 2 * share * b.zy)
            assert got.yy == pytest.approx(a.yy + 2 * share * b.yy)
        for got, a, b in zip(*(Sides(False).of(s) for s in (both, own, invented)), strict=True):
            torch.testing.assert_close(got.moments, a.moments + 2 * share * b.moments, rtol=1e-5, atol=1e-5)
            merged = got.merge((0, 1))
            if share in (0.0, 1e12):
                alone = (b if share else a).merge((0, 1))
                for x, y in zip(merged.into, alone.into, strict=True):
                    torch.testing.assert_close(x @ merged.into[0].T, y @ alone.into[0].T, rtol=1e-4, atol=1e-4)


def sites(
    gm: torch.fx.GraphModule, probe: GraphProbe, given: Sequence[CallInputs], invented: Sequence[CallInputs] = ()
) -> list[Site]:
    return [replace(f.site, activations=a) for f, a in Stream(gm, probe.found, given, invented).sites()]


def test_merged_heads_of_a_narrow_vocabulary_hold_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, home, away = Reader().eval(), texts(count=6), texts(low=100, high=290)
    fast, same = (attnopt.optimize(model, GroupedQuery(2), home[0], calibration=home) for _ in range(2))
    monkeypatch.setattr("attnopt.compiler.job.for_encoders", lambda *_: [])
    narrow = attnopt.optimize(model, GroupedQuery(2), home[0], calibration=home)
    assert error(fast, model, away) < 0.8 * error(narrow, model, away)
    assert error(fast, model, home) < error(narrow, model, home) + 0.02
    assert torch.equal(fast(*away[0]), same(*away[0]))
    told = "grouped-query: fitted to 576 random tokens, too, which count 0.5 times as much as the data"
    assert all(told in site.notes for site in fast.report.sites)
    assert not any("random tokens" in note for site in narrow.report.sites for note in site.notes)


def test_decoders_are_fitted_to_the_data_alone() -> None:
    model, data = Reader(causal=True).eval(), texts()
    fast = attnopt.optimize(model, GroupedQuery(2), data[0], calibration=data)
    assert not any("random tokens" in note for site in fast.report.sites for note in site.notes)


def test_calls_of_shared_weights_are_fitted_together_on_random_tokens_too() -> None:
    model = Reader()
    model.layers[1] = model.layers[0]
    gm, given, probe = arranged(model, texts())
    random = with_random_tokens(gm, given, 0)
    passes = dict.fromkeys([f.site.name for f in probe.found], (GroupedQuery(2),))
    ((group, now),) = jointly(Stream(gm, probe.found, given, random), tied(probe.found, passes))
    assert len(group) == 2
    assert now.invented is not None
    assert now.invented.calls == 2
    assert len(now.invented.batches) == 2 * len(random)


def error(fast: nn.Module, model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        wrong = sum(float((fast(*x) - model(*x)).square().sum()) for x in data)
        return wrong / sum(float(model(*x).square().sum()) for x in data)


@pytest.mark.parametrize("first", [HeadPatch([1], "mean"), PruneHeads(0.5, budget="site")])
def test_other_passes_see_the_data_alone(first: Pass) -> None:
    """Beside one that fits to random tokens, and before it."""
    model, data, grouped = Reader().eval(), texts(count=3), GroupedQuery(2, budget="site")
    alone = attnopt.optimize(model, {"layers.0": first}, data[0], calibration=data)
    beside = attnopt.optimize(model, {"layers.0": first, "layers.1": grouped}, data[0], calibration=data)
    assert alone.sites[0].spec == beside.sites[0].spec
    assert alone.report.sites[0].notes == beside.report.sites[0].notes
    both = attnopt.optimize(model, {"layers.0": [first, grouped]}, data[0], calibration=data)
    assert both.report.sites[0].notes[: len(alone.report.sites[0].notes)] == alone.report.sites[0].notes


# ---------------------------------------------------------------- how far other data lie
def test_the_distance_is_the_ratio_of_mean_leverages() -> None:
    model, home, away = stack(1), batches(), [x * torch.linspace(0.1, 3, 16) for x in batches(seed=5)]
    _, given, probe = arranged(model, [*home, *away])
    with pytest.warns(attnopt.AttnoptWarning, match="far from the calibration data: the leverage .* 6 times as large"):
        found = attnopt.calibration_distance(model, home, away)
    z, other = (MeanMoments().of(next(probe.sites(some))) for some in (given[:4], given[4:]))
    assert z[-1, -1] == pytest.approx(1.0)
    assert z.shape == (17, 17)
    lever = torch.linalg.inv(z + 1e-3 * z.diagonal()[:-1].mean() * torch.eye(17, dtype=torch.float64))
    wanted = torch.trace(other @ lever) / torch.trace(z @ lever)
    assert found["layers.0"] == pytest.approx(float(wanted))


def test_data_like_the_calibration_are_near_and_others_warn() -> None:
    model, home = Reader().eval(), texts(count=6)
    assert attnopt.calibration_distance(model, home, home) == pytest.approx({"layers.0": 1.0, "layers.1": 1.0})
    with pytest.warns(attnopt.AttnoptWarning, match="far from the calibration data"):
        far = attnopt.calibration_distance(model, home, texts(low=100, high=290))
    assert all(ratio > 4 for ratio in far.values())
    with pytest.raises(attnopt.CalibrationError, match="no attention was found"):
        attnopt.calibration_distance(nn.Linear(4, 4), [torch.randn(2, 4)], [torch.randn(2, 4)])
