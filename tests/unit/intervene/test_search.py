"""The search for heads: against every set of heads tried apart, deterministic, and nothing is lost if it fails."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from stacks import stack
from torch import Tensor, nn

import attnopt
from attnopt.errors import AttnoptWarning, PolicyError, SearchError
from attnopt.passes import AddValues, GroupedQuery, HeadPatch, LocalWindow, MixMap, ScaleHeads, SoftPAG, Steer

pytestmark = pytest.mark.usefixtures("one_capture")
small = cache(stack)  # of which a graph is captured once
X = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(5))
EVERY = [(f"layers.{i}", h) for i in range(2) for h in range(4)]
EDITS: dict[str, Any] = {
    "zero": "zero",
    "soft-pag": SoftPAG(u=0.5),
    "text": "soft-pag(u=0.25)",
    "window": LocalWindow(2),
    "mean": HeadPatch([0, 1, 2, 3], "mean"),
    "steered": Steer([1.0, 2.0, 0.0, -1.0]),
    "values": AddValues([0, 3], alpha=0.5),
    "map": MixMap(torch.full((12, 12), 1 / 12), gate=0.5),
}


def score(model: nn.Module) -> Tensor:
    out: Tensor = model(X)
    return out[:, -1, 3].sum() - out[:, 4, 7].square().mean()


def apart(policy: Any) -> float:
    """The same of a model compiled for these heads alone."""
    return float(score(attnopt.optimize(small(), policy, (X,), calibration=[X])).detach())


@pytest.mark.parametrize("name", EDITS)
def test_one_compiled_model_gives_what_each_edit_gives_alone(name: str) -> None:
    found = attnopt.search_heads(small(), score, 2, (X,), edit=EDITS[name], calibration=[X])
    assert found.base == pytest.approx(float(score(small()).detach()), rel=1e-4)
    assert found.value == pytest.approx(apart(found.policy), rel=1e-4, abs=1e-4)
    assert found.value != pytest.approx(found.base, abs=1e-3)
    assert len(found.evaluated) == 1 + 8 + 7
    assert found.is_complete


def test_greedy_takes_the_best_head_of_each_round() -> None:
    found = attnopt.search_heads(small(), score, 3, (X,))
    chosen: list[tuple[str, int]] = []
    for step in found.steps:
        values = {h: found.evaluated[frozenset([*chosen, h])] for h in EVERY if h not in chosen}
        assert step.value == values[step.added] == max(values.values())
        chosen.append(step.added)
    assert found.chosen == tuple(chosen)
    assert sum(map(len, found.heads.values())) == 3


def test_swaps_end_where_none_helps() -> None:
    found = attnopt.search_heads(small(), score, 2, (X,), method="swaps")
    values = {s: attnopt_value(s) for s in map(frozenset, combinations(EVERY, 2))}
    best = values[frozenset(found.chosen)]
    assert found.value == pytest.approx(best, rel=1e-4)
    near = [s for s in values if len(s & {*found.chosen}) == 1]
    assert all(values[s] <= best + 1e-4 for s in near)


def attnopt_value(heads: frozenset[tuple[str, int]]) -> float:
    """With hooks that zero the inputs of the output projections."""
    model, handles = stack(), []
    for site, h in heads:
        module = model.get_submodule(site).o

        def silenced(_: nn.Module, args: Any, h: int = h) -> Any:
            z = args[0].clone()
            z[..., 4 * h : 4 * h + 4] = 0.0
            return (z,)

        handles.append(module.register_forward_pre_hook(silenced))
    return float(score(model).detach())


def test_a_swap_is_made() -> None:
    """Two heads that are good alone and bad together."""
    pair = {("layers.0", 0), ("layers.0", 1)}
    single = {("layers.0", 0): 5.0, ("layers.0", 1): 4.0, ("layers.1", 2): 3.0}
    tried: list[frozenset[tuple[str, int]]] = []

    def objective(model: Any) -> float:
        on = {
            (n, h) for n, s in zip(["layers.0", "layers.1"], switches(model), strict=True) for h in range(4) if s[0, h]
        }
        tried.append(frozenset(on))
        return -10.0 if on == pair else sum(single.get(h, 0.0) for h in on)

    found = attnopt.search_heads(small(), objective, 2, (X,), method="swaps")
    assert {*found.chosen} == {("layers.0", 0), ("layers.1", 2)}
    assert any(step.removed is not None for step in found.steps)
    assert [step.value for step in found.steps[2:]] == sorted(step.value for step in found.steps[2:])
    assert len(tried) == len(set(tried))  # each set once


def switches(model: Any) -> list[Tensor]:
    return [b for name, b in sorted(model.named_buffers()) if "switch" in name]


def test_the_same_seed_gives_the_same_search() -> None:
    def noisy(model: nn.Module) -> Tensor:
        out: Tensor = model(X + 0.1 * torch.randn(X.shape))
        return out.sum()

    state = torch.get_rng_state()
    first, second = (attnopt.search_heads(small(), noisy, 2, (X,), method="swaps", seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.evaluated == second.evaluated
    assert first.steps == second.steps
    assert attnopt.search_heads(small(), noisy, 2, (X,), seed=4).base != first.base


def test_what_was_found_is_kept_if_the_objective_raises() -> None:
    calls = iter(range(100))

    def failing(model: nn.Module) -> Tensor:
        if next(calls) == 12:
            raise RuntimeError("the sampler broke")
        return score(model)

    with pytest.raises(SearchError, match="after 12 evaluations: RuntimeError: the sampler broke") as caught:
        attnopt.search_heads(small(), failing, 3, (X,))
    partial = caught.value.partial
    assert isinstance(partial, attnopt.HeadSearch)
    assert not partial.is_complete
    assert len(partial.chosen) == 1
    assert len(partial.evaluated) == 12
    made = iter(range(100))

    def counted(model: nn.Module) -> Tensor:
        next(made)
        return score(model)

    again = attnopt.search_heads(small(), counted, 3, (X,), start=partial)
    assert again == attnopt.search_heads(small(), score, 3, (X,))
    assert next(made) == 1 + 8 + 7 + 6 - 12


def test_a_limit_ends_the_search() -> None:
    found = attnopt.search_heads(small(), score, 3, (X,), limit=10)
    assert (len(found.evaluated), len(found.chosen), found.is_complete) == (10, 1, False)
    assert "ended early" in str(found)


def test_guidance_with_the_heads_that_were_found() -> None:
    model = small()
    found = attnopt.search_heads(model, score, 2, (X,), edit=SoftPAG(u=0.5), sites="layers.1", heads=[0, 2, 3])
    assert found.heads == {"layers.1": tuple(sorted(h for _, h in found.chosen))}
    guided = attnopt.guidance(model, found.policy, (X,), scale=1.5)
    weak = attnopt.optimize(model, found.policy, (X,))
    want = model(X) + 1.5 * (model(X) - weak(X))
    assert torch.allclose(guided(X), want, atol=1e-3)


def test_other_sizes_where_the_example_lets_them() -> None:
    lengths = iter((5, 7, 9))

    def varied(model: nn.Module) -> Tensor:
        out: Tensor = model(X[:, : next(lengths, 12)])
        return out.sum()

    assert attnopt.search_heads(small(), varied, 1, (X,), dynamic_shapes="auto").is_complete


def test_sites_that_refuse_have_no_candidates() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.cross = (
                nn.MultiheadAttention(16, 4, batch_first=True),
                nn.MultiheadAttention(16, 4, batch_first=True),
            )

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = self.own(x, x, x, need_weights=False)[0]
            out: Tensor = self.cross(x, y, y, need_weights=False)[0]
            return out

    model, args = Both().eval(), (X, torch.randn(3, 5, 16))
    with pytest.warns(AttnoptWarning, match="1 of 2 sites refuse soft-pag and have no candidates, the first cross"):
        found = attnopt.search_heads(model, lambda m: m(*args).sum(), 1, args, edit=SoftPAG(u=1.0))
    assert set(found.heads) == {"own"}
    with pytest.raises(PolicyError, match="soft-pag is refused by every site, the first cross"):
        attnopt.search_heads(model, lambda m: m(*args).sum(), 1, args, edit=SoftPAG(u=1.0), sites="cross")


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no objective": ({"objective": 3}, "objective is a int, expected a function"),
    "no heads": ({"k": 0}, "k=0"),
    "too many heads": ({"k": 9}, "k=9: there are 8 candidates"),
    "another method": ({"method": "gready"}, "did you mean 'greedy'"),
    "no inputs": ({"args": ()}, "needs example inputs"),
    "weights": ({"edit": GroupedQuery(2)}, "invalid value edit=GroupedQuery"),
    "gains": ({"edit": ScaleHeads({1: 0.5})}, "invalid value edit=ScaleHeads"),
    "two edits": ({"edit": [SoftPAG(), SoftPAG()]}, "one pass with a heads option"),
    "pruned": ({"edit": "prune-heads(heads=[0])"}, "prune-heads changes the number of heads"),
    "no calibration": ({"edit": HeadPatch([0], "mean")}, "every site, the first layers.0: [needs-calibration]"),
    "no such site": ({"sites": "layers.9"}, "no attention is named 'layers.9'"),
    "no such head": ({"heads": [7]}, "there is no head 7 in layers.0"),
    "no limit": ({"limit": 0}, "limit=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_said(name: str) -> None:
    changed, text = ERRORS[name]
    given: dict[str, Any] = {"objective": score, "k": 1, "args": (X,), **changed}
    with pytest.raises(PolicyError) as caught:
        attnopt.search_heads(small(), given.pop("objective"), given.pop("k"), given.pop("args"), **given)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "text"), [(torch.ones(2), "a tensor of shape [2]"), (float("nan"), "the objective is nan")]
)
def test_an_objective_that_returns_no_number(returned: Any, text: str) -> None:
    with pytest.raises(SearchError) as caught:
        attnopt.search_heads(small(), lambda m: returned, 1, (X,))
    assert text in str(caught.value)
    assert "with no head edited" in str(caught.value)


@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
def test_a_model_without_attention() -> None:
    with pytest.raises(PolicyError, match="no attention was found"):
        attnopt.search_heads(nn.Linear(16, 16), score, 1, (X,))


def test_the_result_is_plain_data_and_prints() -> None:
    found = attnopt.search_heads(small(), score, 1, (X,))
    assert found.to_json()["chosen"] == [list(found.chosen[0])]
    assert f"{found.chosen[0][0]} {found.chosen[0][1]}" in str(found)
