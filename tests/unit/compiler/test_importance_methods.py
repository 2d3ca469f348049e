"""How methods are named: by a name, by text with options, as instances and as statistics; in policies and in results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from stacks import batches, stack
from torch import Tensor

import attnopt
from attnopt import Curves, HeadProbe, Importance, ModelImportance, PluginError, Policy, Site, Statistic
from attnopt.compiler.importance import head_importance, head_profile, methods
from attnopt.errors import CalibrationError, PolicyError
from attnopt.passes import PruneHeads
from attnopt.statistics import Counterfactual, Distance, Entropy, MassiveFeatures, Ships, SinkMass

pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture(scope="module")
def given() -> Any:
    return stack(), batches(1)


@dataclass(frozen=True)
class Largest(Statistic[Tensor]):
    """The largest weight of each head."""

    def measure(self, site: Site) -> Tensor:
        assert site.activations is not None
        return torch.stack([p.amax((0, 2, 3)) for p in site.activations.weights(site.spec)]).amax(0)


@dataclass(frozen=True)
class Rows(Statistic[Curves]):
    def measure(self, site: Site) -> Curves:
        assert site.activations is not None
        (p,) = site.activations.weights(site.spec)
        return Curves.of("key", range(p.shape[3]), p.mean((0, 2)))


@pytest.mark.parametrize(
    ("text", "instance"),
    [
        ("distance", Distance()),
        ("distance(grid=(3, 4))", Distance((3, 4))),
        ("distance(grid=[3, 4], metric='chebyshev')", Distance((3, 4), metric="chebyshev")),
        (" sink-mass ( keys = None ) ", SinkMass(None)),
        ("massive-features('q')", MassiveFeatures("q")),
        ("ships(kind='zero')", Ships("zero")),
        ("random(seed=3)", "random(seed=3)"),
    ],
)
def test_text_and_instance_are_one(text: str, instance: Any, given: Any) -> None:
    model, data = given
    found = head_importance(model, data, text)
    assert found == head_importance(model, data, instance)
    if not isinstance(instance, str):
        assert found.method == instance.to_json()
    assert head_importance(model, data, found.method) == found


def test_the_seed_of_random(given: Any) -> None:
    model, data = given
    assert head_importance(model, data, "random", seed=3) == head_importance(model, data, "random(seed=3)")
    assert head_importance(model, data, "random") != head_importance(model, data, "random(seed=3)")


@pytest.mark.slow  # every statistic on a whole model
def test_a_statistic_of_a_number_for_each_head_is_a_method(given: Any) -> None:
    model, data = given
    found = head_importance(model, data, Largest())
    assert found.method == "Largest()"
    fast = attnopt.optimize(model, PruneHeads(0.25, importance=Largest()), (data[0],), calibration=data * 4)
    many = head_importance(model, data * 4, Largest())
    fast = attnopt.optimize(
        model, PruneHeads(0.25, importance=Largest(), budget="site"), (data[0],), calibration=data * 4
    )
    for site in fast.sites:
        least = min(range(4), key=lambda h, name=site.name: (many[name][h], -h))
        assert site.spec.heads == tuple(h for h in range(4) if h != least)
        assert "by the importance Largest()" in str(fast.report.to_json())


def test_profiles_of_a_statistic_and_of_methods(given: Any) -> None:
    model, data = given
    profile = head_profile(model, data, Rows())
    assert profile["layers.1"].axis == "key"
    assert sum(profile["layers.1"].values[2]) == pytest.approx(1.0)
    assert profile.heads == {"layers.0": (0, 1, 2, 3), "layers.1": (0, 1, 2, 3)}
    assert "head profile: Rows() by key, 10 of 12 columns" in str(profile)
    assert profile.to_json()["curves"]["layers.0"]["at"] == [float(n) for n in range(12)]
    reach = head_profile(model, data, Distance((3, 4)))
    assert reach["layers.0"].at == (0.0, 1.0, 2.0, 3.0, 4.0)
    for curves in reach.values():
        assert [sum(row) for row in curves.values] == pytest.approx([1.0] * 4)


def test_profiles_of_heads_that_remain(given: Any) -> None:
    model, data = given
    fast = attnopt.optimize(model, PruneHeads(heads=[0, 2]), (data[0],))
    both, some = (head_profile(model, data, "sink-mass", sites=s) for s in (None, fast.sites[1:]))
    assert list(some) == ["layers.1"]
    assert some.heads == {"layers.1": (1, 3)}
    assert some["layers.1"].values == (both["layers.1"].values[1], both["layers.1"].values[3])


@pytest.mark.slow  # every method on a whole model
def test_policies_hold_methods_with_options(given: Any) -> None:
    model, data = given
    for how in (Distance((3, 4)), "distance(grid=(3, 4))", SinkMass(2), "flap", Entropy()):
        policy = Policy.of(PruneHeads(0.25, importance=how))
        assert Policy.from_json(policy.to_json()) == policy
    fast = attnopt.optimize(
        model,
        "prune-heads(fraction=0.25, importance='distance(grid=(3, 4))', budget='site')",
        (data[0],),
        calibration=data * 4,
    )
    scores = head_importance(model, data * 4, Distance((3, 4)))
    for site in fast.sites:
        least = min(range(4), key=lambda h, name=site.name: (scores[name][h], -h))
        assert least not in site.spec.heads
    again = attnopt.optimize(model, fast.report.policy, (data[0],), calibration=data * 4)
    assert [s.spec.heads for s in again.sites] == [s.spec.heads for s in fast.sites]


def test_a_grid_that_does_not_fit_is_a_refusal_of_the_pass(given: Any) -> None:
    model, data = given
    with pytest.warns(attnopt.AttnoptWarning, match="the policy changes nothing"):
        fast = attnopt.optimize(model, PruneHeads(0.25, importance=Distance((5, 5))), (data[0],), calibration=data * 4)
    (refusal,) = {str(s.refusals["prune-heads"]) for s in fast.report.sites if s.refusals}
    assert "[wrong-length] expected 0 + 5 x 5 tokens, found 12 tokens" in refusal


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("distances", "invalid value method='distances': expected one of 'weights'"),
        ("distance(", r"method='distance\(': expected one of"),
        ("distance(grid=(3, 4)", "cannot read"),
        ("distance(size=3)", "distance.*unexpected keyword argument 'size'"),
        ("distance(grid=entropy())", "unknown name 'entropy'"),
        ("distance(grid=(3, 4)) + 1", "expected one of"),
        ("retrieval", "method='retrieval': retrieval: missing a required argument: 'needles'"),
        ("segment-mass", "missing a required argument: 'queries'"),
        (3, "method=3: expected one of"),
        (Rows(), r"Rows\(\) has many numbers for each head"),
    ],
)
def test_methods_that_are_none(method: Any, message: str, given: Any) -> None:
    model, data = given
    with pytest.raises(PolicyError, match=message):
        head_importance(model, data, method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("flap", "'flap' has one number for each head and no profile"),
        ("ships", "head_profile: 'ships' has one number for each head"),
        (Largest(), r"Largest\(\) measures Tensor, expected attnopt.Curves"),
    ],
)
def test_profiles_that_are_none(method: Any, message: str, given: Any) -> None:
    model, data = given
    with pytest.raises(PolicyError, match=message):
        head_profile(model, data, method)


@pytest.mark.parametrize("how", ["ships", "induction", Ships("zero"), Counterfactual([])])
def test_a_pass_does_not_see_the_whole_model(how: Any) -> None:
    with pytest.raises(PolicyError, match="needs the whole model, and a pass sees one site") as caught:
        PruneHeads(0.25, importance=how)
    assert caught.value.hint == "pass importance=attnopt.head_importance(model, data, ...)"


def test_batches_that_a_method_brings_may_have_other_sizes(given: Any) -> None:
    model, (x,) = given
    scores = head_importance(model, [x], Counterfactual([x[:, :5]]))
    assert min(scores["layers.0"]) > 0
    with pytest.raises(CalibrationError, match="calibration batch 0 is a str"):
        head_importance(model, [x], Counterfactual(["text"]))


# ---------------------------------------------------------------- third parties
class Count(ModelImportance):
    name: ClassVar[str] = "acme.count"

    def __init__(self, gives: Any = None) -> None:
        self.gives = gives

    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        if self.gives == "fault":
            raise ZeroDivisionError("by zero")
        found = {site.name: [float(len(probe.batches))] * site.num_heads for site in probe.sites()}
        return found if self.gives is None else self.gives


def test_a_model_importance_of_a_third_party(given: Any) -> None:
    model, data = given
    assert dict(head_importance(model, data * 2, Count())) == {"layers.0": (2.0,) * 4, "layers.1": (2.0,) * 4}


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ("fault", "of_model failed: ZeroDivisionError: by zero"),
        ({}, r"of_model gave scores of \[\], expected those of \['layers.0', 'layers.1'\]"),
        ({"layers.0": [1.0], "layers.1": [1.0]}, "scores gave 1 numbers, expected one for each of 4 heads"),
        ({"layers.0": [1.0] * 4, "layers.1": [float("nan")] * 4}, "expected finite numbers"),
    ],
)
def test_its_faults_are_its_own(gives: Any, message: str, given: Any) -> None:
    model, data = given
    with pytest.raises(PluginError, match=message) as caught:
        head_importance(model, data, Count(gives))
    assert "acme.count" in str(caught.value)


class Bent(Importance):
    name: ClassVar[str] = "acme.bent"

    def scores(self, site: Site) -> Sequence[float]:
        return [0.0] * site.num_heads

    def profile(self, site: Site) -> Curves:
        return Curves("x", (0.0,), ((1.0,),))


def test_a_profile_of_too_few_heads(given: Any) -> None:
    model, data = given
    with pytest.raises(PluginError, match="profile gave 1 curves, expected Curves of 4 heads"):
        head_profile(model, data, Bent())
    with pytest.raises(ValueError, match=r"curves of \[1, 2\] numbers at 1 positions"):
        Curves("x", (0.0,), ((1.0,), (1.0, 2.0)))


def test_every_name_is_listed_once() -> None:
    assert len(set(methods())) == len(methods())
    assert {"induction", "retrieval", "ships", "sahara", "distance", "flap", "taylor"} <= set(methods())
