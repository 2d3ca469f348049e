"""The search on a small model: what it says of its policy is what the policy does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import Twice, batches, stack
from torch import Tensor, nn

import attnopt
from attnopt import Budget, Choice
from attnopt.errors import AttnoptWarning, CalibrationError, PolicyError, SearchError
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads

pytestmark = pytest.mark.usefixtures("one_capture")
small = cache(stack)  # of which a graph is captured once
DATA = batches(6, 4)
X = DATA[0]
WINDOWS = ((), (LocalWindow(4),), (LocalWindow(1),))
MIXED = ((), (LocalWindow(1),), (PruneHeads(0.5),), (GroupedQuery(2), LocalWindow(2)))


def one_of(alternatives: Any) -> Choice:
    """``()`` leaves the attention as it is."""
    return Choice(*(list(passes) or None for passes in alternatives))


def choices(alternatives: Any, layers: int = 2) -> dict[str, Choice]:
    return {f"layers.{i}": one_of(alternatives) for i in range(layers)}


def searched(policy: Any = None, budget: Budget | None = None, **options: Any) -> attnopt.Search:
    given = {"calibration": DATA, "evaluations": 40, **options}
    return attnopt.search(small(), policy, (X,), budget=budget or Budget(flops=0.93), **given)


def distance(fast: nn.Module, data: list[Tensor]) -> float:
    """Mean cosine distance of the outputs, token by token."""
    with torch.no_grad():
        pairs = [(fast(x).flatten(0, 1), small()(x).flatten(0, 1)) for x in data]
    got, want = (torch.cat(x).double() for x in zip(*pairs, strict=True))
    return float((1 - (got * want).sum(-1) / got.norm(dim=-1) / want.norm(dim=-1)).mean())


def test_windows_are_judged_on_all_data_and_the_policy_makes_that_model() -> None:
    found = searched(choices(WINDOWS))
    fast = found.optimize()
    assert found.divergence == pytest.approx(distance(fast, DATA), rel=1e-4)
    assert found.report.best is not None
    assert found.report.best.costs["flops"] == fast.report.cost_after.flops * len(X)
    assert found.report.original["flops"] == fast.report.cost_before.flops * len(X)
    assert found.report.best.costs["flops"] <= 0.93 * found.report.original["flops"]
    assert found.report.is_complete
    for point in found.front[:3]:
        assert point.divergence == pytest.approx(distance(found.optimize(point.policy), DATA), rel=1e-3, abs=1e-9)


def test_a_fit_is_judged_on_data_that_it_has_not_seen() -> None:
    found = searched(choices(MIXED), Budget(parameters=0.85))
    fitted, held = [DATA[i] for i in (0, 1, 2, 4, 5)], [DATA[3]]
    fast = attnopt.optimize(small(), found.policy, (X,), calibration=fitted)
    assert found.divergence == pytest.approx(distance(fast, held), rel=1e-4)
    assert found.report.best is not None
    assert found.report.best.costs["parameters"] == sum(p.numel() for p in fast.graph_module.parameters())
    assert found.report.original["parameters"] == sum(p.numel() for p in small().parameters())


def test_the_policy_is_plain() -> None:
    found = searched(choices(MIXED), Budget(parameters=0.85))
    read = attnopt.Policy.from_json(json.loads(json.dumps(found.policy.to_json())))
    assert read == found.policy
    assert all(name.startswith("layers.") for name, _ in found.policy.rules)


def test_bytes_of_keys_and_values_under_windows() -> None:
    """Four heads of 4 features in two layers; a window of 1 keeps 2 keys of 12, and half the heads keep half."""
    found = searched(choices(((), (LocalWindow(1),), (LocalWindow(1, heads=[0, 1]),))), Budget(kv_bytes=0.3))
    a_key = 2 * 4 * 4 * len(X)  # K and V, 4 features of 4 bytes
    assert found.report.original["kv_bytes"] == 2 * 4 * 12 * a_key
    by_policy = {str(point.policy): point.costs["kv_bytes"] for point in found.front}
    both = attnopt.Policy.of({"layers.0": LocalWindow(1), "layers.1": LocalWindow(1)})
    assert by_policy[str(both)] == 2 * 4 * 2 * a_key
    assert found.report.best is not None
    assert found.report.best.costs["kv_bytes"] in {2 * 4 * 2 * a_key, (4 * 2 + 2 * 2 + 2 * 12) * a_key}


def test_a_window_that_sees_ahead_keeps_all_keys() -> None:
    model = stack(1, causal=False)
    space = {"layers.0": Choice(None, LocalWindow(1))}
    with pytest.raises(PolicyError, match=r"the least possible is .* \(1 of the original"):
        attnopt.search(model, space, (X,), calibration=DATA, budget=Budget(kv_bytes=0.9))


@pytest.mark.slow  # a search in a process of its own
def test_memory_is_weights_and_keys() -> None:
    found = searched(choices(MIXED), Budget(memory=0.9))
    bytes_of = sum(4 * p.numel() for p in small().parameters())
    with_keys = bytes_of + 2 * 4 * 12 * 2 * 4 * 4 * len(X)
    masks = found.report.original["memory"] - with_keys
    assert 0 <= masks <= 2 * 12 * 12 * 4 + 64  # what the graph stores beside parameters


def test_latency_is_measured_for_each_kind_of_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.base.cpu_timing import Times
    from attnopt.policy_search.latency import Clock

    compared: list[list[str]] = []

    def compare(self: Clock, models: Any) -> Times:
        """As if heads took one ms each, and the user's own model one more."""
        compared.append(list(models))

        def ms(model: Any) -> float:
            sites = getattr(model, "sites", None)
            return 9.0 if sites is None else sum(s.num_heads for s in sites)

        return Times({name: (ms(m) / 1e3,) * 3 for name, m in models.items()})

    monkeypatch.setattr(Clock, "call", lambda self, model, inputs: model)
    monkeypatch.setattr(Clock, "compare", compare)
    found = searched(choices(((), (PruneHeads(0.25),), (PruneHeads(0.5),))), Budget(latency=0.67))
    assert found.report.original["latency"] == pytest.approx(9.0)
    assert found.report.best is not None
    assert found.report.best.costs["latency"] == pytest.approx(6.0)
    assert found.report.latency == {"predicted": pytest.approx(6.0), "measured": pytest.approx(6.0)}
    assert [len(names) for names in compared] == [2, 3, 2]  # two kinds for four choices, and the check


@pytest.mark.filterwarnings("ignore:search. the whole model takes")  # a busy machine
def test_latency_on_this_machine() -> None:
    found = searched(choices(((), (PruneHeads(0.75),))), Budget(latency=1e6), evaluations=4)
    assert found.report.original["latency"] > 0
    assert set(found.report.latency) == {"predicted", "measured"}


def test_the_default_choices() -> None:
    found = searched(None, Budget(parameters=0.8, kv_bytes=0.6), evaluations=8)
    assert found.report.best is not None
    assert found.report.best.costs["parameters"] <= 0.8 * found.report.original["parameters"]
    assert found.report.best.costs["kv_bytes"] <= 0.6 * found.report.original["kv_bytes"]
    assert found.report.uniform is not None
    assert found.divergence <= found.report.uniform.divergence


def test_windows_of_the_heads_that_look_at_the_nearest_keys() -> None:
    """Two heads of four look at their own key and the one before, the others at random keys."""
    from attnopt.base.call_inputs import CallInputs
    from attnopt.compiler.analyze import analyze_in_eval
    from attnopt.policy_search.default_choices import default_choices, near_heads

    class Near(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for _ in range(3))
            apart = (torch.arange(16)[:, None] - torch.arange(16)).abs()
            slopes = torch.tensor([0.0, 4.0, 0.0, 4.0])[:, None, None]
            out: Tensor = ((q @ k.mT - slopes * apart).softmax(-1) @ v).transpose(1, 2).flatten(2)
            return out

    inputs = CallInputs((torch.randn(2, 16, 16),), {})
    analyzed = analyze_in_eval(Near(), inputs)
    gm, found = analyzed.program.module, analyzed.findings.found
    assert [*near_heads(gm, found, [inputs]).values()] == [(1, 3)]
    (space,) = default_choices(gm, found, [inputs], Budget(kv_bytes=0.5))
    assert {p.heads for passes in space.alternatives for p in passes if isinstance(p, LocalWindow)} == {None, (1, 3)}


def test_a_uniform_policy_may_name_other_heads_at_each_attention() -> None:
    from attnopt.policy_search.candidates import Alternative

    one, other, every = (Alternative((LocalWindow(2, heads=heads),), ()).kind for heads in ([0, 1], [2], None))
    assert one == other != every


@pytest.mark.slow  # several searches
def test_the_same_seed_gives_the_same_search() -> None:
    state = torch.get_rng_state()
    first, second = (searched(choices(MIXED, 2), Budget(flops=0.8), evaluations=12, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.front == second.front
    assert first.policy == second.policy


def test_attentions_that_share_weights_are_decided_together() -> None:
    model = Twice().eval()
    names = [s.name for s in attnopt.inspect(model, (X,)).sites]
    assert len(names) == 2
    budget = Budget(flops=0.9)
    both = Choice(None, PruneHeads(0.5))
    found = attnopt.search(model, both, (X,), calibration=DATA, budget=budget)
    assert {name for name, _ in found.policy.rules} == {*names}
    each = Choice(None, LocalWindow(1))
    found = attnopt.search(model, each, (X,), calibration=DATA, budget=Budget(flops=0.96))
    assert len(found.policy.rules) == 1


def test_data_that_is_much_shorter_than_the_call_that_counts_is_told() -> None:
    with pytest.warns(AttnoptWarning, match="at most 12 tokens in a sequence, and costs are those of 48"):
        found = searched(Choice(None, LocalWindow(20)), Budget(flops=0.99, at=(1, 48)))
    assert found.divergence == pytest.approx(0.0, abs=1e-9)


# ------------------------------------------------------------ the user's own metric
def loss(model: nn.Module) -> Tensor:
    out: Tensor = model(X)
    return (out - small()(X)).square().mean()


def test_the_users_own_metric() -> None:
    found = searched(choices(WINDOWS), evaluate=loss)
    assert found.divergence == pytest.approx(float(loss(found.optimize()).detach()), rel=1e-4)
    assert found.report.measure == "evaluate (loss), lower is better"


def test_a_metric_that_grows_is_noticed() -> None:
    with pytest.warns(AttnoptWarning, match="lower is better: return minus the score"):
        searched(choices(WINDOWS), evaluate=lambda m: -loss(m))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (RuntimeError("no more memory"), "RuntimeError: no more memory"),
        (float("nan"), "the evaluate is nan"),
        (torch.ones(2), "a tensor of shape [2]"),
    ],
)
def test_what_was_found_is_kept_if_evaluate_fails(wrong: Any, text: str) -> None:
    def failing(model: Any) -> Any:
        if any(str(s.spec.pattern) == "Causal() & Window(left=1, right=0)" for s in model.sites):
            if isinstance(wrong, Exception):
                raise wrong
            return wrong
        return loss(model)

    with pytest.raises(SearchError) as caught:
        searched(choices(WINDOWS), evaluate=failing)
    assert text in str(caught.value)
    assert "local-window(left=1)" in str(caught.value)
    assert "layers." in str(caught.value)
    partial = caught.value.partial
    assert isinstance(partial, attnopt.Search)
    assert not partial.report.is_complete
    assert partial.report.policies >= 1


# ------------------------------------------------------------ ended and resumed
@pytest.mark.slow  # several searches
def test_a_search_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    path, done = tmp_path / "state.json", list[bool]()

    def counted(model: Any) -> Tensor:
        done.append("refit" in str(model.report.policy))
        if len(done) == 5:
            raise RuntimeError("killed")
        return loss(model)

    options: dict[str, Any] = {"evaluate": counted, "resume": path}
    with pytest.raises(SearchError, match=r"state\.json keeps all measurements"):
        searched(choices(MIXED), Budget(flops=0.8), **options)
    resumed = searched(choices(MIXED), Budget(flops=0.8), **options)
    once = len(done) - 1
    assert once == resumed.report.policies
    assert resumed.front == searched(choices(MIXED), Budget(flops=0.8), evaluate=loss).front
    other = searched(choices(MIXED), Budget(flops=0.85), **options)  # another budget asks for nothing that is known
    assert all(done[once + 1 :])
    assert other.divergence <= resumed.divergence


@pytest.mark.slow  # several searches
@pytest.mark.subprocess
def test_a_search_that_is_killed_loses_nothing_that_it_wrote(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "support")!r})
import torch
from stacks import batches, stack
import attnopt
from attnopt.passes import LocalWindow
from attnopt.policy_search import state
state.EVERY = 0.0
model, data, done = stack(), batches(6, 4), []
def evaluate(m):
    done.append(1)
    if len(done) == 5 and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return (m(data[0]) - model(data[0])).square().mean()
space = attnopt.Choice(None, LocalWindow(4), LocalWindow(1))
found = attnopt.search(model, space, (data[0],), calibration=data, budget=attnopt.Budget(flops=0.93), evaluate=evaluate,
                       resume={str(tmp_path / "state.json")!r})
print(len(done), found.report.policies)
"""
    killed = subprocess.run([sys.executable, "-c", script, "kill"], capture_output=True, text=True, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = subprocess.run([sys.executable, "-c", script, "go"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    calls, policies = map(int, done.stdout.split())
    assert (calls, policies) == (9 - 4, 9)


@pytest.mark.parametrize("changed", ["choices", "model", "calibration data", "measure"])
def test_a_state_of_another_search_is_refused(tmp_path: Path, changed: str) -> None:
    path = tmp_path / "state.json"
    searched(choices(WINDOWS), resume=path)
    model = small()
    if changed == "model":
        model = stack()
        model.layers[0].q.weight.data[3, 3] += 1.0
        model.layers[0].q.weight.data *= 1.5
    given: dict[str, Any] = {"calibration": batches(6, 4, seed=9) if changed == "calibration data" else DATA}
    if changed == "measure":
        given["divergence"] = "kl"
    space = choices(MIXED if changed == "choices" else WINDOWS)
    with pytest.raises(SearchError, match=f"the state of another search: other {changed}"):
        attnopt.search(model, space, (X,), budget=Budget(flops=0.93), resume=path, **given)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"format": 9}',
        '{"format": 4, "marks": {}, "machine": "", "times": {}, "values": [[1]], "refitted": []}',
    ],
)
def test_a_file_that_is_no_state_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(SearchError, match="is no state of a search"):
        searched(choices(WINDOWS), resume=path)
    assert path.read_text() == text


def test_minutes_end_a_search() -> None:
    found = searched(choices(MIXED), Budget(flops=0.8), minutes=1e-6)
    assert not found.report.is_complete
    assert found.policy.rules
    assert "ended early" in str(found.report)


# ------------------------------------------------------------ what is shown
def test_the_report_prints_and_is_plain_data(tmp_path: Path) -> None:
    seen: list[attnopt.Progress] = []
    found = searched(choices(WINDOWS), progress=seen.append)
    text = str(found.report)
    assert "budget: flops 0.93 of the original; cosine distance of the outputs" in text
    assert "the best uniform policy" in text
    assert "layers.0" in text
    data = json.loads(json.dumps(found.report.to_json()))
    assert data["best"]["divergence"] == found.divergence
    page = found.report.to_html(tmp_path / "front.html").read_text()
    assert page.count("<circle") == len(found.front)
    assert "local-window" in page
    assert {p.stage for p in seen} >= {"uniform policies", "every policy"}
    assert seen[-1].best == found.divergence
    assert seen[-1].evaluations == found.report.evaluations


# ------------------------------------------------------------ bad input
def test_choices_that_every_attention_refuses() -> None:
    with pytest.raises(
        PolicyError, match=r"every attention refuses all of its choices, the first by layers\.0: \[kv-heads"
    ):
        searched(choices(((), (GroupedQuery(3, "mean", "adjacent", "none"),))))


def test_what_some_attentions_refuse_is_told() -> None:
    space = {
        "layers.0": Choice(None, LocalWindow(1), GroupedQuery(3, "mean", "adjacent", "none")),
        "layers.1": Choice(None, LocalWindow(1)),
    }
    found = searched(space)
    assert [(site, passes) for site, passes, _ in found.report.refused] == [
        ("layers.0", "grouped-query(kv_heads=3, merge='mean', grouping='adjacent', compensate='none')")
    ]
    assert "Refused" in str(found.report)


def test_an_impossible_budget() -> None:
    with pytest.raises(
        PolicyError, match=r"flops of at most .* \(0\.1 of the original\); the least possible is .* of the orig"
    ):
        searched(choices(WINDOWS), Budget(flops=0.1))


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no budget": ({"budget": 0.5}, PolicyError, "budget is a float, expected attnopt.Budget"),
    "no data": ({"calibration": []}, CalibrationError, "calibration is empty"),
    "evaluate": ({"evaluate": 3}, PolicyError, "evaluate is a int, expected a function"),
    "divergence": ({"divergence": "kll"}, PolicyError, "did you mean 'kl'"),
    "evaluations": ({"evaluations": 0}, PolicyError, "evaluations=0"),
    "minutes": ({"minutes": 0}, PolicyError, "minutes=0"),
    "no inputs": ({"args": ()}, PolicyError, "needs example inputs"),
    "another site": ({"policy": choices(WINDOWS, 3)}, PolicyError, "no attention is named 'layers.2'"),
    "another device": ({"budget": Budget(flops=0.9, device="cuda")}, PolicyError, "the model is on cpu"),
    "train mode": ({"model": stack().train()}, PolicyError, "the model is in train mode"),
    "no attention": ({"model": nn.Linear(16, 16).eval()}, PolicyError, "no attention was found"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_said(name: str) -> None:
    changed, kind, text = ERRORS[name]
    given: dict[str, Any] = {
        "model": small(), "policy": choices(WINDOWS), "args": (X,), "calibration": DATA, "budget": Budget(flops=0.93), **changed,
    }  # fmt: skip
    with pytest.raises(kind) as caught:
        attnopt.search(given.pop("model"), given.pop("policy"), given.pop("args"), **given)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "no resource is limited"),
        ({"flops": 0.0}, "flops=0.0: expected a share"),
        ({"latency": float("nan")}, "latency=nan"),
        ({"memory": "1 GB"}, "memory='1 GB'"),
        ({"kv_bytes": True}, "kv_bytes=True"),
        ({"flops": 0.5, "at": (1, 2, 3)}, r"at=(1, 2, 3)"),
        ({"flops": 0.5, "at": 0}, "at=0"),
        ({"flops": 0.5, "device": "tpu"}, "device='tpu'"),
    ],
)
def test_budgets_that_are_none(given: dict[str, Any], text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Budget(**given)
    assert text in str(caught.value)


def test_shares_and_absolute_budgets() -> None:
    original = {"latency": 8.0, "flops": 1000.0, "kv_bytes": 64.0}
    assert Budget(latency=0.5, flops=700, kv_bytes=1).limits(original) == {"latency": 4.0, "flops": 700, "kv_bytes": 1}
    assert Budget(latency=1.0).limits(original) == {"latency": 8.0}
    assert str(Budget(latency=0.5, flops=700)) == "latency 0.5 of the original, flops 700 FLOPs"
