"""What a policy leaves open: how choices are written, and what each attention accepts of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from places import ROOT
from policy_strategies import POLICIES
from stacks import batches, stack

import attnopt
from attnopt import Choice, FirstOf, Pass, Policy, Refusal, Rewrite, Site, where
from attnopt.base.call_inputs import CallInputs
from attnopt.compiler import ways
from attnopt.compiler.analyze import analyze
from attnopt.compiler.choices import SiteChoices, site_choices
from attnopt.compiler.job import Job, Options, backends_of
from attnopt.errors import ArchiveError, PolicyError, RewriteError
from attnopt.passes import DynamicSparse, Fuse, GroupedQuery, LocalWindow, PruneHeads, SegmentGain, SoftPAG, Sparse
from attnopt.patterns import Causal, Window

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore:the policy changes nothing:attnopt.AttnoptWarning"),
]


@dataclass(frozen=True)
class LastK(Pass):
    """A third party's: each query sees itself and the keys before it, where there are at least four heads."""

    name: ClassVar[str] = "acme.last-k"
    exact: ClassVar[bool] = False
    keys: int
    step: int = 1

    def check(self, site: Site) -> Refusal | None:
        return None if self.keys < 9 else site.refuse("too-many", expected="fewer than 9", found=self.keys)

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec.restricted(Window(self.keys - 1, 0)))


# ---------------------------------------------------------------- how they are written
def test_an_option_with_alternatives_makes_several_passes() -> None:
    assert LocalWindow(left=Choice(64, 256), sinks=4) == Choice(LocalWindow(64, sinks=4), LocalWindow(256, sinks=4))
    assert LocalWindow(Choice(1, 2), right=Choice(None, 3)) == Choice(
        LocalWindow(1), LocalWindow(1, 3), LocalWindow(2), LocalWindow(2, 3)
    )
    assert GroupedQuery(FirstOf(3, 2)) == FirstOf(GroupedQuery(3), GroupedQuery(2))
    assert LocalWindow(Choice(1, 2), FirstOf(3, 4)) == Choice(
        FirstOf(LocalWindow(1, 3), LocalWindow(1, 4)), FirstOf(LocalWindow(2, 3), LocalWindow(2, 4))
    )
    assert LastK(keys=Choice(1, 2)) == Choice(LastK(1), LastK(2))  # a third party does nothing for it
    assert replace(LocalWindow(1, sinks=2), left=Choice(3, 4)) == Choice(
        LocalWindow(3, sinks=2), LocalWindow(4, sinks=2)
    )
    assert Sparse(Choice(Causal(), Window(3))) == Choice(Sparse(Causal()), Sparse(Window(3)))


def test_choices_in_choices_are_one() -> None:
    assert Choice(None, Choice(1, Choice(2, 3))) == Choice(None, 1, 2, 3)
    assert FirstOf(FirstOf(1, 2), 3) == FirstOf(1, 2, 3)
    assert Choice(FirstOf(1, 2), 3).alternatives == (FirstOf(1, 2), 3)
    assert Choice(1) != FirstOf(1)
    assert repr(Choice(None, FirstOf(1, 2))) == "Choice(None, FirstOf(1, 2))"


WINDOWS = Choice(None, LocalWindow(left=Choice(64, 256, 1024), sinks=4))


@pytest.mark.parametrize(
    "written",
    [
        WINDOWS,
        [WINDOWS],
        Choice([], "local-window(left=64, sinks=4)", LocalWindow(left=Choice(256, 1024), sinks=4)),
        "choice(none, local-window(left=choice(64, 256, 1024), sinks=4))",
        "choice(None, choice(local_window(64, sinks=4), local-window(left=choice(256, 1024), sinks=4)))",
        "choice([], [local-window(choice(64, 256, 1024), sinks=4)])",
        {"pass": "local-window", "left": 64, "sinks": 4},
        [{"choice": [None, {"pass": "local-window", "left": {"choice": [64, 256, 1024]}, "sinks": 4}]}],
        {"choice": [[], "local-window(left=choice(64, 256, 1024), sinks=4)"]},
    ],
)
def test_every_way_to_write_a_choice(written: Any, tmp_path: Path) -> None:
    alone = isinstance(written, dict) and "pass" in written
    expected = Policy.of({"a": LocalWindow(64, sinks=4) if alone else WINDOWS})
    assert Policy.of({"a": written}) == expected
    ((key, steps),) = expected.rules
    made = Choice((), *((LocalWindow(left, sinks=4),) for left in (64, 256, 1024)))
    assert (key, steps) == ("a", (LocalWindow(64, sinks=4),) if alone else (made,))


def test_sequences_and_first_of_in_texts() -> None:
    text = "fuse, first-of([grouped-query(2), local-window(3)], choice(soft-pag, none)), first_of(fuse, none)"
    assert Policy.of(text) == Policy.of(
        [Fuse(), FirstOf([GroupedQuery(2), LocalWindow(3)], Choice(SoftPAG(), None)), FirstOf(Fuse(), None)]
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("choice()", "choice: there is nothing to choose from"),
        ("local-window(left=choice())", "choice: there is nothing to choose from"),
        ("choice(3)", "3 is not a pass"),
        ("choice(Causal())", "Causal() is not a pass"),
        ("none", "None in 'none' is not a pass"),
        ("choice(a=3)", "choice: got an unexpected keyword argument 'a'"),
        ("local-window(left=choice(3, -1))", "local-window: invalid value left=-1"),
        ("sparse(Window(choice(3, 4)))", "Window: invalid value left=Choice(3, 4)"),
        ({"choice": 3}, "choice: invalid value 3: expected a list of alternatives"),
        ({"pass": "local-window", "left": {"choice": 3}}, "choice: invalid value 3: expected a list of alternatives"),
        ({"choice": [None], "first-of": [None]}, "does not name a pass"),
        (Choice({"left": 3}), "{'left': 3} does not name a pass"),
    ],
)
def test_bad_choices(written: Any, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.of({"a": written})
    assert message in str(caught.value)
    assert str(caught.value).startswith("rule 'a': ")


def test_a_mapping_of_rules_stays_one() -> None:
    """A site may be named like a kind of alternatives."""
    assert Policy.of({"choice": "fuse"}).rules == (("choice", (Fuse(),)),)


@given(POLICIES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_saved_policies_read_back(tmp_path: Path, policy: Policy) -> None:
    for name in ("p.yaml", "p.json"):
        policy.save(tmp_path / name)
        assert Policy.of(tmp_path / name) == policy
        assert policy.rules == Policy.of(str(tmp_path / name)).rules


def test_a_pass_that_stands_twice_is_written_out(tmp_path: Path) -> None:
    """Policy files have no aliases."""
    gain = SegmentGain([0], 0.5, normalise="redistribute", to=[1], when={"mass": 0.2, "share": 0.5})
    policy = Policy({"a": gain, "b": [gain, Choice(gain, None)]})
    policy.save(tmp_path / "p.yaml")
    assert Policy.of(tmp_path / "p.yaml") == policy


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"the policy cannot be saved: .*unknown pass 'acme\.last-k'"):
        Policy.of(LastK(3)).save(tmp_path / "p.yaml")
    with pytest.raises(PolicyError, match=r"p\.txt: the name of a policy file must end in"):
        Policy.of("fuse").save(tmp_path / "p.txt")
    with pytest.raises(ArchiveError, match="cannot write"):
        Policy.of("fuse").save(tmp_path / "nowhere" / "p.yaml")
    assert not [*tmp_path.iterdir()]


def test_the_file_of_the_documentation(tmp_path: Path) -> None:
    _, _, rest = (ROOT / "docs" / "policies.md").read_text("utf-8").partition("```yaml\n")
    (tmp_path / "p.yaml").write_text(rest.partition("```")[0], "utf-8")
    assert Policy.of(tmp_path / "p.yaml") == Policy(
        {
            where(causal=True, layers=slice(2, -2)): WINDOWS,
            where(is_cross=False).heads(distance="<8").expect(12): LocalWindow(8),
            "decoder.*.cross": FirstOf(GroupedQuery(2), None),
            "encoder.0": LocalWindow(Choice(16, 32)),
        }
    )


# ---------------------------------------------------------------- the first that is accepted
@pytest.fixture(scope="module")
def model() -> Any:
    return stack()


DATA = batches(2)
ARGS = (DATA[0],)


def same(model: Any, policy: Any, by_hand: Any, **options: Any) -> attnopt.OptimizedModel:
    """Both make the same model."""
    fast, other = (attnopt.optimize(model, p, ARGS, **options) for p in (policy, by_hand))
    assert [s.form_after for s in fast.report.sites] == [s.form_after for s in other.report.sites]
    assert [s.passes for s in fast.report.sites] == [s.passes for s in other.report.sites]
    with torch.no_grad():
        torch.testing.assert_close(fast(*ARGS), other(*ARGS), rtol=0, atol=0)
    return fast


@pytest.mark.slow
def test_first_of_is_the_pass_that_it_takes(model: Any) -> None:
    fast = same(model, FirstOf(GroupedQuery(3), GroupedQuery(2), GroupedQuery(1)), GroupedQuery(2))
    assert fast.report.sites[0].status == "rewritten"
    assert not fast.report.sites[0].refusals
    assert [n for n in fast.report.sites[0].notes if n.startswith("not taken")] == [
        "not taken: grouped-query refused [kv-heads-do-not-fit] expected kv_heads to be one of 1, 2, 4, found 3 "
        "(at tiny_models.py:21)"
    ]
    same(model, FirstOf(None, GroupedQuery(2)), [])
    same(model, FirstOf(GroupedQuery(3), None), [])
    same(model, [LocalWindow(3), FirstOf(GroupedQuery(3), PruneHeads(heads=[1])), SoftPAG([0])],
         [LocalWindow(3), PruneHeads(heads=[1]), SoftPAG([0])])  # fmt: skip


@pytest.mark.slow  # optimizes a model for every alternative
def test_a_sequence_is_accepted_as_a_whole(model: Any) -> None:
    fast = same(model, FirstOf([LocalWindow(3), GroupedQuery(3)], [GroupedQuery(2), LocalWindow(2)]),
                [GroupedQuery(2), LocalWindow(2)])  # fmt: skip
    assert "not taken: grouped-query refused after local-window [kv-heads" in " ".join(fast.report.sites[0].notes)
    same(model, FirstOf([GroupedQuery(2), GroupedQuery(4)], SoftPAG()), SoftPAG())  # each alone is accepted
    same(model, FirstOf([FirstOf(GroupedQuery(3), GroupedQuery(5)), LocalWindow(3)], Fuse()), Fuse())
    same(model, FirstOf([LocalWindow(3), FirstOf(GroupedQuery(3), GroupedQuery(2))], Fuse()),
         [LocalWindow(3), GroupedQuery(2)])  # fmt: skip


def test_what_no_alternative_suits_is_refused(model: Any) -> None:
    policy = {"layers.0": FirstOf(GroupedQuery(3), [LocalWindow(3), LocalWindow(2, heads=[7])])}
    fast = attnopt.optimize(model, policy, ARGS)
    site = fast.report.sites[0]
    assert (site.status, site.passes) == ("refused", ())
    assert {name: refusal.code for name, refusal in site.refusals.items()} == {
        "grouped-query": "kv-heads-do-not-fit",
        "local-window": "unknown-head",
    }
    with pytest.raises(RewriteError, match=r"layers\.0: grouped-query refused"):
        attnopt.optimize(model, policy, ARGS, strict=True)
    assert attnopt.optimize(model, {"*": FirstOf(GroupedQuery(3), "fuse")}, ARGS, strict=True).report.sites[0].passes
    rest = same(model, [FirstOf(GroupedQuery(3), GroupedQuery(5)), LocalWindow(2)], [LocalWindow(2)])
    assert set(rest.report.sites[0].refusals) == {"grouped-query"}  # skipped, as a pass that is refused is


@pytest.mark.slow  # optimizes a model for every alternative
def test_first_of_with_calibration_data(model: Any) -> None:
    options: Any = {"calibration": DATA}
    learnt = DynamicSparse("low-rank(rank=2, queries=2)", keep=0.5, block=4)
    same(model, FirstOf(learnt, LocalWindow(3)), LocalWindow(3))  # refused without data
    same(model, FirstOf(learnt, LocalWindow(3)), learnt, **options)
    same(model, FirstOf(GroupedQuery(9), GroupedQuery(2)), GroupedQuery(2), **options)  # one budget for all sites


def test_backends_refuse_alternatives(model: Any) -> None:
    """A backend that computes no bias of this kind refuses what the passes accept."""
    from attnopt.backends import Sdpa

    class NoWindows(Sdpa):
        name: ClassVar[str] = "no-windows"

        def check(self, spec: attnopt.AttentionSpec) -> Refusal | None:
            return None if spec.pattern == Causal() else Refusal("no-windows", "all keys", str(spec.pattern))

    fast = same(model, FirstOf(LocalWindow(3), SoftPAG([0])), SoftPAG([0]), backend=NoWindows())
    assert "not taken: backend no-windows refused after local-window [no-windows]" in " ".join(
        fast.report.sites[0].notes
    )


@pytest.mark.parametrize(
    "policy",
    [Choice(None, Fuse()), {"layers.0": [Fuse(), FirstOf(Choice("fuse", None), None)]}, LocalWindow(left=Choice(1, 2))],
)
def test_a_choice_is_for_the_search(model: Any, policy: Any) -> None:
    for entry in (attnopt.optimize, lambda *a: attnopt.guidance(*a, scale=1.0), attnopt.convert):
        with pytest.raises(
            PolicyError, match=r"leaves a choice open.*\n  hint: attnopt\.search finds the best of them"
        ):
            entry(model, policy, ARGS)
    with pytest.raises(PolicyError, match="leaves a choice open"):
        attnopt.optimize(model, policy)  # though nothing is captured yet


# ---------------------------------------------------------------- what a search chooses from
def choices(model: Any, policy: Any, calibration: Any = ()) -> tuple[SiteChoices, ...]:
    inputs = CallInputs(ARGS, {})
    analyzed = analyze(model, inputs)
    data = [CallInputs((x,), {}) for x in calibration]
    job = Job(model, Policy.of(policy), inputs, None, data, backends_of("auto"), Options())
    return site_choices(job, analyzed.program, analyzed.findings)


def test_the_alternatives_of_each_site(model: Any) -> None:
    policy = {
        "*": [Choice(None, LocalWindow(Choice(2, 4))), Choice(None, GroupedQuery(Choice(3, 1)))],
        "layers.1": [Fuse(), LocalWindow(2)],
    }
    first, second = choices(model, policy)
    two, four, one = LocalWindow(2), LocalWindow(4), GroupedQuery(1)
    assert first.site == "layers.0"
    assert first.alternatives == ((), (one,), (two,), (two, one), (four,), (four, one))
    assert [(r.passes, r.by, r.refusal.code) for r in first.refused] == [
        ((GroupedQuery(3),), "grouped-query", "kv-heads-do-not-fit")
    ]
    assert second == SiteChoices("layers.1", ((Fuse(), LocalWindow(2)),))


def test_sites_without_a_rule_and_with_nothing_that_they_accept(model: Any) -> None:
    first, second = choices(model, {"layers.0": Choice(GroupedQuery(3), GroupedQuery(5))})
    assert first.alternatives == ((),)
    assert [r.passes for r in first.refused] == [(GroupedQuery(3),), (GroupedQuery(5),)]
    assert second == SiteChoices("layers.1", ((),))
    rest, _ = choices(model, {"layers.0": [Choice(GroupedQuery(3), GroupedQuery(5)), Choice(None, SoftPAG())]})
    assert rest.alternatives == ((), (SoftPAG(),))


def test_alternatives_are_distinct_and_in_their_order(model: Any) -> None:
    found, _ = choices(model, {"layers.0": Choice(Fuse(), None, [], Fuse(), [FirstOf(GroupedQuery(3), Fuse())])})
    assert found.alternatives == ((Fuse(),), ())
    found, _ = choices(
        model, {"layers.0": [FirstOf(GroupedQuery(3), Choice(LocalWindow(1), LocalWindow(2))), Choice("fuse")]}
    )
    assert found.alternatives == ((LocalWindow(1), Fuse()), (LocalWindow(2), Fuse()))
    found, _ = choices(model, {"layers.0": Choice(FirstOf(LocalWindow(1), LocalWindow(2)), LocalWindow(FirstOf(3, 4)))})
    assert found.alternatives == ((LocalWindow(1),), (LocalWindow(3),))


def test_calibration_data_decides_what_is_refused(model: Any) -> None:
    learnt = DynamicSparse("low-rank(rank=2, queries=2)", keep=0.5, block=4)
    policy = {"layers.1": Choice(None, learnt), "layers.0": Choice(LocalWindow(1), None)}
    assert [c.alternatives for c in choices(model, policy)] == [((LocalWindow(1),), ()), ((),)]
    assert [c.alternatives for c in choices(model, policy, DATA)] == [((LocalWindow(1),), ()), ((), (learnt,))]


def test_conditions_with_choices(model: Any) -> None:
    policy = {
        where(causal=True, layers=-1).heads(weights=">0"): Choice(None, LocalWindow(2), LocalWindow(3, heads=[1, 2]))
    }
    first, second = choices(model, policy)
    assert first.alternatives == ((),)
    assert second.alternatives == ((), (LocalWindow(2, heads=range(4)),), (LocalWindow(3, heads=[1, 2]),))


def test_too_many_combinations(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "MOST", 100)
    policy = [LocalWindow(Choice(*range(1, 9))) for _ in range(3)]
    with pytest.raises(PolicyError, match="the choices of one rule make more than 100 combinations"):
        choices(model, policy)
    with pytest.raises(PolicyError, match="more than 100 combinations"):
        choices(model, Choice(policy, None))


def test_an_attention_whose_weights_are_returned_has_no_choice() -> None:
    class Shown(tiny_models.Attention):
        def forward(self, x: torch.Tensor) -> Any:
            B, L, E = x.shape
            q, k, v = (f(x).view(B, L, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
            weights = (q @ k.transpose(-1, -2) / (E // self.heads) ** 0.5).softmax(-1)
            return self.o((weights @ v).transpose(1, 2).reshape(B, L, E)), weights.softmax(-1)

    (found,) = choices(Shown().eval(), Choice(LocalWindow(2), "fuse"))
    assert found.alternatives == ((),)
    assert {r.refusal.code for r in found.refused} == {"escapes"}
