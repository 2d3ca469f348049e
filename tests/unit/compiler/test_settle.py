"""Conditions in ``optimize``: what is measured, which rule counts, and that the result is that of the rule written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import tiny_models
import torch
from stacks import batches, stack

import attnopt
from attnopt import Choice, FirstOf, Importance, Policy, Site, where
from attnopt.compiler.explain import explain
from attnopt.compiler.plugins import KINDS
from attnopt.errors import CalibrationError, PolicyError
from attnopt.passes import Fuse, GroupedQuery, HeadPatch, LocalWindow, PruneHeads, Sparse
from attnopt.patterns import Causal

pytestmark = pytest.mark.usefixtures("one_capture")

DATA = batches(2)
ARGS = (DATA[0],)


class Sites(Importance):
    """The place of the head plus ten times the number of the layer; ``asked``: at which sites."""

    name: ClassVar[str] = "acme.place"
    needs_calibration: ClassVar[bool] = True
    asked: ClassVar[list[str]] = []

    def scores(self, site: Site) -> Sequence[float]:
        assert site.activations is not None
        Sites.asked.append(site.name)
        return [h + 10.0 * int(site.name[-1]) for h in site.spec.heads]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    for kind in KINDS:
        monkeypatch.setattr(kind, "_registered", dict(kind._registered))
    monkeypatch.setattr(Sites, "asked", [])
    attnopt.register(Sites)
    return lambda bound: {"acme.place": bound}


@pytest.fixture(scope="module")
def model() -> Any:
    return stack(3)


def passes(model: Any, policy: Any, **options: Any) -> list[Any]:
    """What each site was given."""
    fast = attnopt.optimize(model, policy, ARGS, **options)
    return [(s.passes, s.form_after.pattern) for s in fast.report.sites]


def test_conditions_and_names(model: Any) -> None:
    """An exact name first, otherwise the last rule that matches, whatever its kind."""
    policy = {
        "layers.2": LocalWindow(3),
        "*": "fuse",
        where(causal=True, layers=slice(1, None)): LocalWindow(1),
        "layers.[01]": LocalWindow(2),
    }
    with pytest.warns(attnopt.AttnoptWarning) as told:
        found = passes(model, policy)
    assert [pattern.count("left=2") for _, pattern in found] == [1, 1, 0]
    assert "left=3" in found[2][1]
    (warning,) = told
    assert str(warning.message) == (
        "policy rules without effect: '*', where(causal=True, layers=1:); later rules override them at every site"
    )
    first = {where(layers=0): LocalWindow(3), where(layers=":2"): []}
    with pytest.warns(attnopt.AttnoptWarning, match=r"rules without effect: where\(layers=0\); later"):
        assert not any(names for names, _ in passes(model, {**first, "layers.2": "fuse"})[:2])


def test_a_statistic_is_measured_once_for_all_rules(model: Any, place: Any) -> None:
    policy = {
        where(statistics=place("<5")): Sparse(Causal()),
        where(statistics=place(">15"), causal=True): LocalWindow(2),
        where(statistics=place(">5"), entropy=">-1", layers=0).heads(statistics=place((12, 13))): LocalWindow(3),
    }
    found = passes(model, policy, calibration=DATA)
    assert Sites.asked == ["layers.0", "layers.1", "layers.2"]
    assert [p for p, _ in found] == [("sparse",), ("local-window",), ("local-window",)]
    assert found[1][1] == "Causal() & PerHead({(2, 3): Window(left=3, right=0)})"
    assert found[2][1] == "Causal() & Window(left=2, right=0)"


@pytest.mark.slow  # ranks heads by every method
def test_heads_are_those_that_head_importance_ranks(model: Any) -> None:
    """The rule by hand: the heads whose distance is below a bound, with the pass's own limit."""
    distances = attnopt.head_importance(model, DATA, "distance")
    bound = sorted(d for own in distances.values() for d in own)[7]
    near = {n: [h for h, d in enumerate(own) if d < bound] for n, own in distances.items()}
    assert sum(map(len, near.values())) == 7
    policy = {where(causal=True).heads(distance=f"<{bound!r}"): [LocalWindow(2), PruneHeads(heads=range(1, 3))]}
    by_hand = {
        n: [
            LocalWindow(2, heads=own),
            *([PruneHeads(heads=pruned)] if (pruned := [h for h in own if h in (1, 2)]) else []),
        ]
        for n, own in near.items()
        if own
    }
    fast, other = (attnopt.optimize(model, p, ARGS, calibration=DATA) for p in (policy, by_hand))
    assert [s.form_after for s in fast.report.sites] == [s.form_after for s in other.report.sites]
    with torch.no_grad():
        assert torch.equal(fast(*ARGS), other(*ARGS))
    assert fast.report.policy == Policy(policy).to_json()  # the question, whose answer stands at each site
    assert Policy.from_json(attnopt.Report.from_json(fast.report.to_json()).policy) == Policy(policy)


def test_scores_of_the_whole_model(model: Any) -> None:
    scores = attnopt.head_importance(model, DATA, "ablation")
    means = {n: sum(own) / len(own) for n, own in scores.items()}
    best = max(means, key=means.__getitem__)
    second = sorted(means.values())[-2]
    found = passes(model, {where(ablation=f">{second!r}"): LocalWindow(2)}, calibration=DATA)
    assert [bool(p) for p, _ in found] == [n == best for n in means]


def test_statistics_of_weights_need_no_data(model: Any) -> None:
    weights = attnopt.head_importance(model, DATA, "weights")
    bound = sorted(x for own in weights.values() for x in own)[5]
    found = passes(model, {where().heads(weights=f"<={bound!r}"): LocalWindow(1)})
    assert sum(bool(p) for p, _ in found) == sum(min(own) <= bound for own in weights.values())
    assert passes(model, {where(random=(0, 1)): LocalWindow(1)}) == passes(model, LocalWindow(1))


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (
            {where(distance="<3"): "fuse"},
            CalibrationError,
            "where(distance='<3') needs calibration data, on which distance",
        ),
        (
            {where(layers=0).heads(entropy="<3"): LocalWindow(1)},
            CalibrationError,
            "is measured\n  hint: pass calibration=",
        ),
        ({where(causal=False): "fuse"}, PolicyError, "where(causal=False) matches 0 of 3 attentions"),
        (
            {where().expect(4): "fuse"},
            PolicyError,
            "matches 3 of 3 attentions, expected 4: 'layers.0', 'layers.1', 'layers.2'",
        ),
        ({where(): "fuse", "encodr.*": "fuse"}, PolicyError, "no attention is named 'encodr.*'"),
        (
            {where().heads(weights=">0"): PruneHeads(0.5)},
            PolicyError,
            "prune-heads: expected exactly one of fraction and heads",
        ),
    ],
)
def test_what_a_model_does_not_have(model: Any, policy: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        attnopt.optimize(model, policy, ARGS)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "passes",
    [
        GroupedQuery(1),
        [LocalWindow(1), Fuse()],
        FirstOf(LocalWindow(1), GroupedQuery(2)),
        Choice(None, [FirstOf("fuse", None)]),
    ],
)
def test_heads_for_passes_that_take_none(passes: Any) -> None:
    with pytest.raises(
        PolicyError, match=r"^rule where\(\)\.heads.*: (grouped-query|fuse) has no option heads, and where"
    ):
        Policy({where().heads(distance="<3"): passes})


def test_the_heads_of_a_pass_limit_those_of_the_rule() -> None:
    condition = where().heads(distance="<3")
    policy = Policy(
        {condition: [HeadPatch(range(9), "mean"), LocalWindow(2, heads=[5]), FirstOf(LocalWindow(3), None)]}
    )
    chosen = {condition: {"a": (1, 3)}}
    assert policy.passes_for("a", chosen) == (
        HeadPatch([1, 3], "mean"),
        FirstOf((LocalWindow(3, heads=[1, 3]),), ()),
    )
    assert policy.passes_for("b", chosen) == ()


def test_a_model_without_attentions() -> None:
    module, args = tiny_models.without_attention()
    with pytest.warns(attnopt.AttnoptWarning, match="no attention was found"):
        attnopt.optimize(module, {where(distance="<3"): FirstOf(GroupedQuery(1), "fuse")}, args, calibration=[args])
    with pytest.raises(PolicyError, match="matches 0 of 0 attentions, expected 2"):
        attnopt.optimize(module, {where().expect(2): "fuse"}, args)


def test_explain_asks_the_passes_of_the_rule(model: Any) -> None:
    policy = Policy({where(layers=-1): FirstOf(GroupedQuery(3), LocalWindow(2)), "layers.0": FirstOf(GroupedQuery(3))})
    (last,) = explain(model, "layers.2", ARGS, {}, policy)
    assert "local-window" in last.accepted
    (first,) = explain(model, "layers.0", ARGS, {}, policy)
    assert first.refusals["grouped-query"].code == "kv-heads-do-not-fit"
    assert not {"local-window", "grouped-query"} & {*first.accepted}
    with pytest.raises(PolicyError, match="leaves a choice open"):
        explain(model, "layers.0", ARGS, {}, Policy.of(Choice(None, "fuse")))
