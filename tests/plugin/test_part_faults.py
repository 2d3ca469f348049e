"""Third parties' parts of passes: they do what they say, and what they do wrong is told with their name and the site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from stacks import batches, head_inputs, stack
from tiny_llama import tiny_llama
from torch import Tensor, nn

import attnopt
from attnopt import Compensation, HeadWeights, Importance, KvMerge, KvPartition, PluginError, Rewrite, Site, Statistic
from attnopt.compiler import plugins
from attnopt.fit.compensation_methods import error_without
from attnopt.passes import GroupedQuery, PruneHeads, ScaleHeads

HERE = Path(__file__).parent
H, D = 4, 4

pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in plugins.KINDS:
        monkeypatch.setattr(kind, "_registered", {})


@pytest.fixture(scope="module")
def given() -> tuple[nn.Module, list[Tensor]]:
    return stack(), batches()


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example distribution, its classes registered."""
    monkeypatch.syspath_prepend(HERE)
    import acme_attnopt

    for name in ("L1", "Peak", "Diagonal", "Flips", "Strided", "Median", "Rescale"):
        attnopt.register(getattr(acme_attnopt, name))
    return acme_attnopt


# ---------------------------------------------------------------- what they give
@pytest.mark.slow
def test_a_partition_chooses_what_is_merged(acme: Any, given: Any) -> None:
    model, (x, *_) = given
    theirs = attnopt.optimize(model, GroupedQuery(2, grouping="acme.strided"), (x,))
    ours = attnopt.optimize(model, GroupedQuery(2, grouping=(0, 1, 0, 1), merge="mean"), (x,))
    assert theirs.sites[0].spec.kv_of_head == (0, 1, 0, 1)
    assert torch.equal(theirs(x), ours(x))


def test_an_importance_with_an_option_a_profile_and_one_of_the_whole_model(acme: Any, given: Any) -> None:
    model, data = given
    scores = attnopt.head_importance(model, data, "acme.diagonal(width=12)")
    assert scores.method == "acme.diagonal(width=12)"
    for row in scores.values():
        assert row == pytest.approx([1.0] * H)  # all keys that a causal query of 12 sees
    profile = attnopt.head_profile(model, data, acme.Diagonal(2))
    assert [c.at for c in profile.values()] == [(0.0, 1.0)] * 2
    found = attnopt.greedy_heads(model, data, "acme.flips", size=1)
    flips = attnopt.head_importance(model, data, acme.Flips())
    assert found.steps[0][2] == max(x for row in flips.values() for x in row) > 0


@pytest.mark.slow
def test_a_partition_with_data_and_merges_that_learn(acme: Any, given: Any) -> None:
    model, data = given
    for merge in ("score-optimal", "procrustes", "acme.median"):
        policies = [GroupedQuery(2, grouping=g, merge=merge, budget="site") for g in ("acme.strided", (0, 1, 0, 1))]
        theirs, ours = (attnopt.optimize(model, p, (data[0],), calibration=data) for p in policies)
        assert torch.equal(theirs(data[0]), ours(data[0]))
    shared = attnopt.optimize(
        model, GroupedQuery(2, grouping="acme.strided", budget="global"), (data[0],), calibration=data
    )
    assert sum(s.num_kv_heads for s in shared.sites) <= 4


@pytest.mark.slow
def test_a_compensation_changes_the_output_weights(acme: Any, given: Any) -> None:
    model, (x, *_) = given
    theirs = attnopt.optimize(model, PruneHeads(heads=[1], compensate="acme.rescale"), (x,))
    ours = attnopt.optimize(model, [PruneHeads(heads=[1]), ScaleHeads([4 / 3] * H)], (x,))
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-5, rtol=1e-5)
    merged = attnopt.optimize(model, GroupedQuery(2, merge="mean", compensate="acme.rescale"), (x,))
    assert "grouped-query: output weights times 1" in merged.report.sites[0].notes


@pytest.mark.slow
def test_a_budget_measures_what_a_compensation_leaves(acme: Any, given: Any) -> None:
    """Relative to the layer's output on the calibration data, with the weights that the compensation gave."""
    model, data = given
    seen = dict[str, float]()

    @dataclass(frozen=True)
    class Asks(attnopt.Pass):
        name: ClassVar[str] = "acme.asks"
        exact: ClassVar[bool] = True
        calibrates: ClassVar[bool] = True

        def rewrite(self, site: Site) -> Rewrite:
            seen[site.name] = error_without(acme.Rescale(), site, site.spec.keeping([0, 2, 3]))
            return Rewrite(site.spec)

    attnopt.optimize(model, Asks(), (data[0],), calibration=data)
    z = head_inputs(model, data)[0].double()
    weight = model.layers[0].o.weight.detach().double()
    scaled = weight * (4 / 3)
    scaled[:, D : 2 * D] = 0.0
    wanted = (z @ (scaled - weight).T).square().sum() / (z @ weight.T).square().sum()
    assert seen["layers.0"] == pytest.approx(float(wanted), rel=1e-5)
    fast = attnopt.optimize(model, PruneHeads(0.5, compensate="acme.rescale"), (data[0],), calibration=data)
    assert sum(s.num_heads for s in fast.sites) == 4
    emptied = PruneHeads(0.5, compensate="acme.rescale", whole_layers=True)
    assert sum(s.num_heads for s in attnopt.optimize(model, emptied, (data[0],), calibration=data).sites) >= 4


def test_a_statistic_is_measured_once_for_all(acme: Any, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = given
    calls: list[str] = []
    measure = acme.peak.Peaks.measure
    monkeypatch.setattr(acme.peak.Peaks, "measure", lambda self, site: calls.append(site.name) or measure(self, site))

    @attnopt.register
    class Again(acme.Peak):  # type: ignore[misc]
        name: ClassVar[str] = "acme.again"

        def scores(self, site: Site) -> Sequence[float]:
            first, second = super().scores(site), acme.peak.Peaks().of(site)
            assert first == second.tolist()
            return first

    scores = attnopt.head_importance(model, data, "acme.again")
    assert calls == ["layers.0", "layers.1"]
    wanted = head_inputs(model, data)[1].abs().view(-1, H, D).amax((0, 2))
    torch.testing.assert_close(torch.tensor(scores["layers.1"]), wanted)
    fast = attnopt.optimize(
        model, PruneHeads(0.25, importance="acme.peak", budget="site"), (data[0],), calibration=data
    )
    assert set(range(H)) - {*fast.sites[1].spec.heads} == {int(wanted.argmin())}
    with pytest.raises(attnopt.RewriteError, match=r"\[needs-calibration\]"):
        attnopt.optimize(model, PruneHeads(0.25, importance="acme.peak"), (data[0],), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["acme.strided", "acme.rescale"])
def test_in_a_converted_model(policy: str, acme: Any) -> None:
    model = tiny_llama(4)
    ids = torch.randint(50, (1, 12))
    chosen = GroupedQuery(2, grouping=policy) if policy == "acme.strided" else GroupedQuery(2, compensate=policy)
    converted = attnopt.convert(model, chosen, (ids,))
    fast = attnopt.optimize(model, chosen, (ids,), {"use_cache": False})
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, fast(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(converted(ids).logits, model(ids).logits, atol=1e-2)


# ---------------------------------------------------------------- what they do wrong
def registered(base: Any, **body: Any) -> Any:
    return attnopt.register(type("Part", (base,), {"name": "acme.part", "__module__": __name__, **body}))


def partition(groups: Callable[[Site], Any], **more: Any) -> Any:
    return registered(KvPartition, groups=lambda self, site, count, loss: groups(site), **more)


def merge(made: Callable[[Site, str, Any], Any], **more: Any) -> Any:
    return registered(KvMerge, merge=lambda self, site, role, heads: made(site, role, heads), **more)


def turning(**more: Any) -> Any:
    """A merge whose readers follow it by maps that change nothing."""
    return merge(lambda s, r, h: None, **TURNS, readers=lambda self, s, r, h: [torch.eye(D).double()] * len(h), **more)


def compensation(made: Callable[[Site, Any], Any], **more: Any) -> Any:
    more = {"needs_calibration": False, "compensate": lambda self, site, spec: made(site, spec), **more}
    return registered(Compensation, **more)


def importance(scores: Callable[[Site], Any], **more: Any) -> Any:
    return registered(Importance, scores=lambda self, site: scores(site), **more)


def out(head: int, *sizes: int, fill: float = 0.0) -> Callable[[Site, Any], Rewrite]:
    return lambda site, spec: Rewrite(spec, (HeadWeights("out", head, torch.full(sizes, fill)),))


def failing(*_: Any) -> Any:
    raise OSError("no licence")


@dataclass(frozen=True)
class Broken(Statistic[Tensor]):
    def measure(self, site: Site) -> Tensor:
        raise OSError("no disk")


class Unhashable(Statistic[int]):
    __hash__ = None  # type: ignore[assignment]

    def measure(self, site: Site) -> int:
        return 1


GROUPS = GroupedQuery.__name__, {"grouping": "acme.part"}
MERGES = GroupedQuery.__name__, {"merge": "acme.part"}
BUDGET = PruneHeads.__name__, {"fraction": 0.25, "compensate": "acme.part"}
MAKES_UP = PruneHeads.__name__, {"heads": [1], "compensate": "acme.part"}
SCORES = PruneHeads.__name__, {"fraction": 0.25, "importance": "acme.part", "budget": "site"}
KIND = {
    "grouping": "KV partition",
    "merge": "KV merge",
    "compensate": "compensation",
    "importance": "importance method",
}
TURNS = {"adapts_readers": True, "needs": ("q", "k", "v", "out"), "needs_calibration": True}


@pytest.mark.parametrize(
    ("define", "policy", "told"),
    [
        (lambda: partition(failing), GROUPS, "groups failed: OSError: no licence"),
        (lambda: partition(lambda s: 3), GROUPS, "groups failed: TypeError"),
        (
            lambda: partition(lambda s: [(0, 1), (2,)]),
            GROUPS,
            "groups gave ((0, 1), (2,)), expected 2 groups with each of",
        ),
        (
            lambda: partition(lambda s: [(0, 1), (1, 2, 3)]),
            GROUPS,
            "expected 2 groups with each of the key/value heads",
        ),
        (lambda: partition(lambda s: [(0, 1), (2, 7)]), GROUPS, "groups gave ((0, 1), (2, 7)), expected 2 groups"),
        (lambda: partition(lambda s: [(0, 1), (2, "x")]), GROUPS, "groups gave ((0, 1), (2, 'x')), expected 2 groups"),
        (lambda: partition(lambda s: [(0, 1, 2, 3), ()]), GROUPS, "expected 2 groups with each of the key/value heads"),
        (lambda: partition(lambda s: [(0, 1, 2, 3)]), GROUPS, "groups gave ((0, 1, 2, 3),), expected 2 groups"),
        (lambda: partition(failing, check=failing), GROUPS, "check failed: OSError: no licence"),
        (lambda: partition(failing, fits=failing), GROUPS, "fits failed: OSError: no licence"),
        (lambda: partition(failing, check=lambda *_: False), GROUPS, "check failed: TypeError: it returned False"),
        (
            lambda: partition(lambda s: [(0, 1), (2, 3)], moves_queries=True, readers=lambda *_: (0, 0, 0, 0)),
            GROUPS,
            "readers gave (0, 0, 0, 0), expected for each of 4 heads one of 2 groups, each of them read",
        ),
        (lambda: partition(lambda s: [(0, 1), (2, 3)], readers=failing), GROUPS, "readers failed: OSError"),
        (lambda: merge(failing), MERGES, "merge failed: OSError: no licence"),
        (lambda: merge(lambda s, r, h: "k"), MERGES, "edits holds 'k', expected HeadWeights"),
        (
            lambda: merge(lambda s, r, h: HeadWeights(r, h[0], torch.zeros(3, 16))),
            MERGES,
            "new 'k' weights of head 0: expected a tensor [4, 16], got [3, 16]",
        ),
        (
            lambda: merge(lambda s, r, h: HeadWeights(r, h[0], torch.full((4, 16), torch.nan))),
            MERGES,
            "new 'k' weights of head 0: expected finite floating-point numbers",
        ),
        (
            lambda: merge(lambda s, r, h: HeadWeights(r, h[-1], torch.zeros(4, 16))),
            MERGES,
            "new 'k' weights of head 1: expected one of (0, 2)",
        ),
        (lambda: merge(lambda s, r, h: None, **TURNS), MERGES, "readers failed: ValueError"),
        (lambda: merge(lambda s, r, h: None, **TURNS, readers=failing), MERGES, "readers failed: OSError"),
        (lambda: turning(refined=failing), MERGES, "refined failed: OSError: no licence"),
        (lambda: turning(refined=lambda *_: "v"), MERGES, "edits holds 'v', expected HeadWeights"),
        (
            lambda: turning(refined=lambda self, s, g, after: (HeadWeights("v", 0, torch.zeros(1, 16)),)),
            MERGES,
            "new 'v' weights of head 0: expected a tensor [4, 16], got [1, 16]",
        ),
        (lambda: partition(failing, choices=lambda *_: {}), GROUPS, "choices gave [] groups, expected 2"),
        (
            lambda: compensation(failing, error=lambda *_: torch.nan),
            BUDGET,
            "error returned nan, expected a finite number",
        ),
        (lambda: compensation(failing, error=failing), BUDGET, "error failed: OSError: no licence"),
        (lambda: compensation(failing), MAKES_UP, "compensate failed: OSError: no licence"),
        (lambda: compensation(lambda s, spec: None), MAKES_UP, "compensate returned NoneType, expected a Rewrite"),
        (lambda: compensation(lambda s, spec: Rewrite(s.spec)), MAKES_UP, "compensate returned the spec"),
        (
            lambda: compensation(out(0, 3, 16)),
            MAKES_UP,
            "new 'out' weights of head 0: expected a tensor [4, 16], got [3, 16]",
        ),
        (lambda: compensation(out(1, 4, 16)), MAKES_UP, "new 'out' weights of head 1: expected one of (0, 2, 3)"),
        (lambda: compensation(out(0, 4, 16, fill=torch.inf)), MAKES_UP, "expected finite floating-point numbers"),
        (lambda: compensation(failing, check=failing), MAKES_UP, "check failed: OSError: no licence"),
        (lambda: importance(failing), SCORES, "scores failed: OSError: no licence"),
        (lambda: importance(lambda s: [1.0]), SCORES, "scores gave 1 numbers, expected one for each of 4 heads"),
        (lambda: importance(lambda s: [torch.nan] * 4), SCORES, "expected finite numbers"),
        (lambda: importance(failing, check=lambda *_: "no"), SCORES, "check failed: TypeError: it returned 'no'"),
    ],
)
def test_a_fault_names_the_part_and_the_site(define: Any, policy: Any, told: str, given: Any) -> None:
    model, data = given
    define()
    name, options = policy
    made = GroupedQuery(2, budget="site", **options) if name == "GroupedQuery" else PruneHeads(**options)
    with pytest.raises(PluginError) as caught:
        attnopt.optimize(model, made, (data[0],), calibration=data)
    kind = next(KIND[option] for option in options if option in KIND)
    assert told in caught.value.message
    assert f"{kind} 'acme.part' (test_part_faults:Part)" in caught.value.message
    assert caught.value.site == "layers.0"
    assert caught.value.hint == f"exclude the site from the policy, and fix the {kind}"


@pytest.mark.parametrize(
    ("statistic", "told"),
    [(Broken, "statistic 'Broken' (test_part_faults:Broken): measure failed: OSError: no disk"),
     (Unhashable, "statistic 'Unhashable' (test_part_faults:Unhashable): measure failed: TypeError: unhashable")],
)  # fmt: skip
def test_a_statistic_that_fails_is_named_itself(statistic: Any, told: str, given: Any) -> None:
    model, data = given
    importance(lambda site: [float(statistic().of(site))] * 4, needs_calibration=True)
    with pytest.raises(PluginError) as caught:
        attnopt.head_importance(model, data, "acme.part")
    assert told in caught.value.message
    assert caught.value.site == "layers.0"


# ---------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: GroupedQuery(2, grouping="optimall"), "did you mean 'optimal'?"),
        (lambda: GroupedQuery(2, merge="score-optimum"), "did you mean 'score-optimal'?"),
        (lambda: GroupedQuery(2, compensate="least-square"), "did you mean 'least-squares'?"),
        (lambda: PruneHeads(0.5, importance="wandaa"), "did you mean 'wanda'?"),
        (lambda: PruneHeads(0.5, compensate="biass"), "did you mean 'bias'?"),
    ],
)
def test_an_unknown_name(make: Any, told: str) -> None:
    with pytest.raises(attnopt.PolicyError, match="expected one of '") as caught:
        make()
    assert caught.value.hint == told


@pytest.mark.parametrize("base", [KvPartition, Compensation, KvMerge, Importance])
def test_registering(base: Any) -> None:
    kind = next(k for k in plugins.KINDS if k.base is base)
    taken = next(iter(kind.listed()))
    method = next(iter(base.__abstractmethods__))
    body = {"name": taken, method: failing}
    with pytest.raises(PluginError, match=f"{kind.kind} '{taken}' is already .* of attnopt"):
        attnopt.register(type("Rival", (base,), body))
    with pytest.raises(PluginError, match=f"{kind.kind} 'acme.half' .* does not define {method}"):
        attnopt.register(type("Half", (base,), {"name": "acme.half"}))
    with pytest.raises(PluginError, match=f"does not define a {kind.kind} name"):
        attnopt.register(type("Nameless", (base,), {method: failing}))
    attnopt.register(type("Asks", (base,), {**body, "name": "acme.asks", "__init__": lambda self, n: None}))
    with pytest.raises(PluginError, match=f"{kind.kind} 'acme.asks' of this process cannot be constructed"):
        kind.make("acme.asks")


def test_what_does_not_go_together() -> None:
    partition(lambda s: [(0, 1), (2, 3)], moves_queries=True)
    with pytest.raises(attnopt.PolicyError, match="changes the head that a query reads"):
        GroupedQuery(2, grouping="acme.part", merge="svd")
    compensation(lambda site, spec: Rewrite(spec))
    with pytest.raises(attnopt.PolicyError, match=r"compensate='acme.part': it does not make up for merged heads"):
        GroupedQuery(2, compensate="acme.part")


def test_a_refusal_of_a_part_is_the_pass_s(given: Any) -> None:
    model, (x, *_) = given
    partition(failing, check=lambda self, site: site.refuse("too-few", expected="8 heads", found=site.num_kv_heads))
    compensation(failing, check=lambda self, site: site.refuse("no-bias", expected="a bias"))
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        refused = attnopt.optimize(model, GroupedQuery(2, grouping="acme.part"), (x,))
    assert refused.report.sites[0].refusals["grouped-query"].code == "too-few"
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        refused = attnopt.optimize(model, PruneHeads(heads=[0], compensate="acme.part"), (x,))
    assert replace(refused.report.sites[0].refusals["prune-heads"], where="").to_json()["code"] == "no-bias"
