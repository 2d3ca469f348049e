"""Pruning and grouping with calibration data: what is promised of the numbers, on models whose answer is known."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from stacks import batches, head_inputs, stack
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt.fit.block_obs import Surgeon
from attnopt.fit.kv_search import adjacent, agglomerated, optimal, queries_by_norm
from attnopt.fit.least_squares import Moments, ridge
from attnopt.fit.merge_methods import KV_MERGES
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads

H, D = 4, 4

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),  # a refusal leaves a policy without effect
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
]


def optimized(model: nn.Module, policy: Any, data: list[Any], **options: Any) -> attnopt.OptimizedModel:
    return attnopt.optimize(model, policy, (data[0],), calibration=data, **options)


def error(fast: nn.Module, model: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return float(
            sum((fast(x) - model(x)).square().sum() for x in data) / sum(model(x).square().sum() for x in data)
        )


# ---------------------------------------------------------------- pruning
def test_least_squares_makes_up_for_a_copied_head() -> None:
    """Head 3 computes what head 1 does: without it nothing is lost."""
    model, data = stack(1), batches()
    a = model.layers[0]
    for linear in (a.q, a.k, a.v):
        linear.weight.data[12:] = linear.weight.data[4:8]
        linear.bias.data[12:] = linear.bias.data[4:8]
    fast = optimized(model, PruneHeads(0.25), data)
    assert fast.sites[0].spec.heads in ((0, 1, 2), (0, 2, 3))
    new = batches(seed=9)
    assert error(fast, model, new) < 1e-6
    plain = attnopt.optimize(model, PruneHeads(heads=[3]), (data[0],))
    assert error(plain, model, new) > 1e-2
    assert "by block OBS" in fast.report.sites[0].notes[0] or "least squares" in fast.report.sites[0].notes[0]


@pytest.mark.parametrize("strength", [1e-4, 1e-1, 10.0])
def test_a_ridge_is_the_argmin_that_it_says(strength: float) -> None:
    """Against the plain problem with a row for each weight, which asks it to be as before."""
    z, y, toward = (torch.randn(*shape, dtype=torch.float64) for shape in ((50, 7), (50, 3), (7, 3)))
    made = ridge(Moments(z.T @ z, z.T @ y, float(y.square().sum()), len(z)), toward, strength)
    kept = (strength * (z.T @ z).diagonal()[:-1].mean()).sqrt()
    rows = torch.cat([z, kept * torch.eye(7, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([y, kept * toward])).solution
    torch.testing.assert_close(made, wanted)


def test_bias_takes_the_mean_of_what_is_gone() -> None:
    model, data = stack(1), batches()
    fast = optimized(model, PruneHeads(heads=[1], compensate="bias"), data)
    z = head_inputs(model, data)[0]
    out = model.layers[0].o
    z = z.clone()
    z[:, D : 2 * D] = z[:, D : 2 * D].mean(0)
    with torch.no_grad():
        wanted = torch.cat(data).flatten(0, 1) + out(z)
        got = torch.cat([fast(x) for x in data]).flatten(0, 1)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compensate", ["none", "bias", "least-squares"])
def test_compensation_orders_as_it_should(compensate: str) -> None:
    model, data, new = stack(), batches(8), batches(seed=9)
    wrong = {
        how: error(
            optimized(model, PruneHeads(0.5, compensate=how, importance="flap", budget="site"), data), model, new
        )
        for how in ("none", "bias", "least-squares")
    }
    assert wrong["least-squares"] < wrong["bias"] <= wrong["none"] * 1.01


@pytest.mark.slow
def test_a_global_budget_goes_where_the_output_needs_it() -> None:
    """The second layer is loud, the first one is almost silent."""
    model, data = stack(), batches(8)
    model.layers[0].o.weight.data *= 1e-2
    model.layers[0].o.bias.data *= 1e-2
    fast = optimized(model, PruneHeads(0.5), data)
    kept = [s.num_heads for s in fast.sites]
    assert sum(kept) == 4
    assert kept == [1, 3]
    each = optimized(model, PruneHeads(0.5, budget="site"), data)
    assert [s.num_heads for s in each.sites] == [2, 2]
    new = batches(seed=9)
    assert error(fast, model, new) < error(each, model, new)


@pytest.mark.slow
def test_protected_heads_stay() -> None:
    model, data = stack(), batches()
    for budget in ("site", "global"):
        fast = optimized(model, PruneHeads(0.5, protect=[0, 3], budget=budget), data)
        assert all({0, 3} <= set(s.spec.heads) for s in fast.sites)
    for importance in ("flap", [0.0, 1.0, 1.0, 0.0]):
        fast = optimized(model, PruneHeads(0.5, protect=[0, 3], budget="site", importance=importance), data)
        assert [s.spec.heads for s in fast.sites] == [(0, 3)] * 2


def test_block_obs_is_the_best_set() -> None:
    z, y = torch.randn(200, 13).double(), torch.randn(200, 5).double()
    z[:, 3:6] += z[:, 9:12]
    z[:, 12] = 1.0
    today = torch.randn(13, 5).double()
    m = Moments(z.T @ z, z.T @ y, float(y.square().sum()), 200)
    surgeon = Surgeon(m, today, heads=4, width=3, has_bias=True)
    for n, places in surgeon.nested().items():
        best = min(combinations(range(4), n), key=surgeon.error)
        assert surgeon.error(places) == pytest.approx(surgeon.error(best))
    assert all(2 in places for places in surgeon.nested(protected=[2]).values())
    many = Surgeon(
        Moments(torch.eye(25).double(), torch.randn(25, 3).double(), 99.0, 9), torch.zeros(25, 3).double(), 12, 2, True
    )
    for n, places in many.nested(least=3).items():
        assert many.error(places) == pytest.approx(min(map(many.error, combinations(range(12), n))), rel=1e-6)


def test_refit_after_other_passes_is_against_the_original() -> None:
    model, data, new = stack(), batches(8), batches(seed=9)
    policy = [PruneHeads(heads=[0]), ScaleHeads({1: 0.5}), LocalWindow(6), PruneHeads(heads=[2])]
    fast = optimized(model, policy, data)
    assert [s.spec.heads for s in fast.sites] == [(1, 3)] * 2
    assert error(fast, model, new) < error(attnopt.optimize(model, policy, (data[0],)), model, new)
    twice = optimized(model, [PruneHeads(heads=[0]), PruneHeads(heads=[2])], data)
    once = optimized(model, PruneHeads(heads=[0, 2]), data)
    assert error(twice, model, new) == pytest.approx(error(once, model, new), rel=0.05)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, data = stack(), batches()
    fast = optimized(model, [PruneHeads(0.25), GroupedQuery(2, budget="site")], data)
    fast.save(tmp_path / "m")
    oracle.assert_same(oracle.run(attnopt.load(tmp_path / "m"), (data[0],)), oracle.run(fast, (data[0],)), limit=0.0)


# ---------------------------------------------------------------- grouping
def copied(kv_heads: int, of: tuple[int, ...]) -> nn.Module:
    """One layer whose head h has the keys and values of head ``of[h]``."""
    a = (model := stack(1, causal=False)).layers[0]
    for linear in (a.k, a.v):
        for p in (linear.weight, linear.bias):
            heads = p.data.view(H, D, -1)
            heads.copy_(heads[list(of)].clone())
    assert len(set(of)) == kv_heads
    return model


@pytest.fixture(scope="module")
def alternating() -> tuple[nn.Module, list[Tensor]]:
    """Heads 0 and 2, and heads 1 and 3, have the same keys and values; with its data."""
    return copied(2, (0, 1, 0, 1)), batches()


@pytest.mark.parametrize("merge", mostly_slow(["procrustes", "svd", "score-optimal", "mean", "first"], "score-optimal"))
@pytest.mark.parametrize("grouping", ["optimal", "similarity", (0, 1, 0, 1)])
def test_equal_heads_are_found_and_merged_without_loss(merge: str, grouping: Any, alternating: Any) -> None:
    model, data = alternating
    fast = optimized(model, GroupedQuery(2, merge=merge, grouping=grouping), data)
    assert fast.sites[0].spec.kv_of_head == (0, 1, 0, 1)
    assert error(fast, model, batches(seed=9)) < 1e-8


def test_unequal_groups() -> None:
    model, data = copied(2, (0, 1, 0, 0)), batches()
    fast = optimized(model, GroupedQuery(2), data)
    assert fast.sites[0].spec.kv_of_head == (0, 1, 0, 0)
    assert fast.sites[0].spec.kv_heads == (0, 1)
    assert error(fast, model, batches(seed=9)) < 1e-8
    assert "key/value heads {0, 2, 3} {1} merged by score-optimal" in fast.report.sites[0].notes[0]


@pytest.mark.parametrize("merge", mostly_slow(["procrustes", "svd", "score-optimal"], "score-optimal"))
def test_heads_in_another_basis_are_no_loss(merge: str) -> None:
    """Head 1 is head 0 turned: the mean destroys both, merges that look at the data do not."""
    model, data, new = copied(3, (0, 0, 2, 3)), batches(), batches(seed=9)
    a = model.layers[0]
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5)))[0]
    for linear in (a.q, a.k, a.v):
        linear.weight.data[D : 2 * D] = turn @ linear.weight.data[D : 2 * D]
        linear.bias.data[D : 2 * D] = turn @ linear.bias.data[D : 2 * D]
    groups = (0, 0, 1, 2)
    fast = optimized(model, GroupedQuery(3, merge=merge, grouping=groups, compensate="none"), data)
    assert error(fast, model, new) < 1e-6
    mean = optimized(model, GroupedQuery(3, merge="mean", grouping=groups, compensate="none"), data)
    assert error(mean, model, new) > 1e-3


@pytest.mark.slow
def test_values_are_refined_for_the_output_weights_that_were_fitted_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stack(1), batches()

    def left() -> float:
        found = re.search(r"held-out tokens .* -> ([\d.]+)", optimized(model, policy, data).report.sites[0].notes[1])
        assert found is not None
        return float(found[1])

    policy = GroupedQuery(1, budget="site")
    refined = left()
    monkeypatch.setattr(KV_MERGES.load("score-optimal"), "refined", lambda *_: None)
    assert refined < left()


def test_better_methods_lose_less() -> None:
    model, data, new = stack(causal=False), batches(16), batches(4, seed=9)
    runs = [
        GroupedQuery(2, merge="mean", compensate="none", budget="site"),
        GroupedQuery(2, merge="svd", grouping="adjacent", compensate="none"),
        GroupedQuery(2, budget="site"),
    ]
    wrong = [error(optimized(model, p, data), model, new) for p in runs]
    assert wrong[2] < wrong[1] < wrong[0]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data = torch.randn_like(p) / p.shape[-1] ** 0.5 * 1.5
    return model


@pytest.fixture(scope="module")
def turned() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Head 1 is head 0 with each frequency turned by an angle of its own, values in another basis; with its data."""
    model = llama()
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        a, angle = layer.self_attn, torch.rand(4, generator=generator) * 6
        turn = torch.zeros(8, 8)
        for i in range(4):
            turn[i, i] = turn[i + 4, i + 4] = angle[i].cos()
            turn[i, i + 4], turn[i + 4, i] = -angle[i].sin(), angle[i].sin()
        basis = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
        a.k_proj.weight.data[8:16] = turn @ a.k_proj.weight.data[:8]
        a.v_proj.weight.data[8:16] = basis @ a.v_proj.weight.data[:8]
    return model, [{"input_ids": zoo.ids(batch=8, length=9, seed=s)} for s in range(4)]


@pytest.mark.parametrize("merge", [None, "procrustes", "svd", "score-optimal"])
def test_rotary_keys_are_turned_per_frequency(merge: str | None, turned: Any) -> None:
    model, data = turned
    policy = GroupedQuery(3, merge=merge, grouping=(0, 0, 1, 2), compensate="none")
    fast = attnopt.optimize(model, policy, (), data[0], calibration=data)
    assert [s.num_kv_heads for s in fast.sites] == [3, 3]
    new = {"input_ids": zoo.ids(batch=8, length=9, seed=77)}
    oracle.assert_same(oracle.run(fast, (), new), oracle.run(model, (), new), limit=1e-3)
    mean = attnopt.optimize(model, GroupedQuery(3, grouping=(0, 0, 1, 2), merge="mean"), (), data[0])
    oracle.assert_differs(oracle.run(mean, (), new), oracle.run(model, (), new))


class Normed(nn.Module):
    """Queries and keys pass a norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (nn.functional.layer_norm(t, (D,)) for t in (q, k))
        out: Tensor = self.o((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return out


def test_norms_behind_the_projection() -> None:
    """Merges that would have to pass them are refused; the default takes the mean and says so."""
    model, data = Normed().eval(), batches()
    with pytest.raises(attnopt.RewriteError, match=r"\[features-are-not-linear\]"):
        optimized(model, GroupedQuery(2, merge="score-optimal", budget="site"), data, strict=True)
    fast = optimized(model, GroupedQuery(2), data)
    assert "merged by mean" in fast.report.sites[0].notes[0]
    assert fast.sites[0].num_kv_heads == 2


class Gated(nn.Module):
    """What the heads give is multiplied by a gate before the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.g = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        z = (q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2)
        out: Tensor = self.o(z * self.g(x).sigmoid())
        return out


def test_gated_outputs_are_not_fitted() -> None:
    """The output projection does not read what the heads give: fitting it to that would be wrong."""
    model, data = Gated().eval(), batches()
    assert not attnopt.inspect(model, (data[0],)).sites[0].projections["out"].direct
    fast = optimized(model, PruneHeads(heads=[1]), data)
    plain = attnopt.optimize(model, PruneHeads(heads=[1]), (data[0],))
    oracle.assert_same(oracle.run(fast, (data[0],)), oracle.run(plain, (data[0],)), limit=0.0)
    assert optimized(model, PruneHeads(0.25), data).sites[0].num_heads == 3
    with pytest.raises(attnopt.RewriteError, match="scaled before"):
        optimized(model, PruneHeads(heads=[1], compensate="least-squares"), data, strict=True)
    with pytest.raises(attnopt.RewriteError, match="scaled before"):
        optimized(model, GroupedQuery(2, merge="svd", grouping="adjacent"), data, strict=True)
    assert "merged by mean" in optimized(model, GroupedQuery(2), data).report.sites[0].notes[0]
    with pytest.raises(attnopt.CalibrationError, match=r"reach it unchanged"):
        attnopt.head_importance(model, data)
    assert len(attnopt.head_importance(model, data, "ablation")[""]) == H


# ---------------------------------------------------------------- groupings by themselves
def test_partitions() -> None:
    apart = torch.tensor([0.0, 0.1, 5.0, 5.1, 5.2, 9.0])

    def loss(groups: Any) -> Tensor:
        return torch.tensor([float(apart[list(g)].var(unbiased=False)) * len(g) for g in groups], dtype=torch.float64)

    for found in (optimal(6, loss, [3])[3], agglomerated(6, loss)[3]):
        assert sorted(found) == [(0, 1), (2, 3, 4), (5,)]
    assert adjacent(6, 3) == ((0, 1), (2, 3), (4, 5))
    assert [len(g) for g in adjacent(7, 3)] == [2, 2, 3]


@pytest.mark.parametrize("norms", [[1.0, 1.0, 1.0], [10.0, 1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 1.0, 9.0]])
def test_no_key_head_is_starved(norms: list[float]) -> None:
    counts = queries_by_norm(norms, 8)
    assert sum(counts) == 8
    assert min(counts) >= 1
    assert counts[norms.index(max(norms))] >= max(counts) - (len(set(norms)) == 1)


def test_key_norm_grouping() -> None:
    model, data = stack(1), batches()
    model.layers[0].k.weight.data[8:] *= 9.0
    fast = optimized(model, GroupedQuery(2, grouping="key-norm", merge="mean"), data)
    assert fast.sites[0].spec.kv_of_head == (0, 1, 1, 1)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (PruneHeads(0.5, compensate="least-squares"), "needs-calibration"),
        (PruneHeads(0.5, importance="flap"), "needs-calibration"),
        (GroupedQuery(2, merge="svd"), "needs-calibration"),
        (GroupedQuery(2, grouping="optimal"), "needs-calibration"),
        (GroupedQuery(3, grouping="adjacent"), "kv-heads-do-not-fit"),
        (GroupedQuery(2, grouping=(0, 1)), "kv-heads-do-not-fit"),
    ],
)
def test_refusals_name_what_is_missing(policy: Any, message: str) -> None:
    model, x = stack(1), batches(1)[0]
    with pytest.raises(attnopt.RewriteError, match=rf"\[{message}\]") as caught:
        attnopt.optimize(model, policy, (x,), strict=True)
    assert caught.value.site == "layers.0"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneHeads(0.5, importance="best"), "expected one of 'weights'"),
        (lambda: PruneHeads(0.5, compensate="all"), "invalid value compensate='all'"),
        (lambda: PruneHeads(0.5, budget="layer"), "invalid value budget='layer'"),
        (lambda: PruneHeads(heads=[1], budget="global"), "budget is only used with fraction"),
        (lambda: PruneHeads(0.5, importance={}), "a mapping from site"),
        (lambda: GroupedQuery(2, grouping="random"), "invalid value grouping='random'"),
        (lambda: GroupedQuery(2, grouping=(0, 2)), "one group per head, numbered 0 to 1"),
        (lambda: GroupedQuery(2, grouping="key-norm", merge="svd"), "changes the head that a query reads"),
        (lambda: GroupedQuery(2, compensate="bias"), "invalid value compensate='bias'"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(attnopt.PolicyError, match=message):
        make()


# ---------------------------------------------------------------- calls of one set of weights
@pytest.mark.parametrize("policy", [PruneHeads(0.5), PruneHeads(0.5, budget="site"), GroupedQuery(2)], ids=str)
def test_one_set_of_weights_stays_one(policy: Any) -> None:
    model, data = stack(3), batches()
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    fast = optimized(model, policy, data)
    assert len(fast.sites) == 3
    assert len({s.spec for s in fast.sites}) == 1
    assert sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in model.parameters())


def test_shared_weights_are_fitted_on_all_their_calls() -> None:
    """That serves the model better than what is best for the first call."""
    model, data = stack(1), batches()
    model.layers = nn.ModuleList([model.layers[0]] * 2)
    fast = optimized(model, PruneHeads(heads=[3]), data)
    counted = 2 * sum(x.shape[0] * x.shape[1] for x in data) * 7 // 8
    assert all(f"least squares on {counted} tokens" in s.notes[0] for s in fast.report.sites)
    new = batches(seed=9)
    first_alone = stack(1)
    first_alone.load_state_dict(model.state_dict(), strict=False)
    fitted = optimized(first_alone, PruneHeads(heads=[3]), data)
    unfair = stack(1)
    unfair.load_state_dict(model.state_dict(), strict=False)
    unfair.layers = nn.ModuleList([unfair.layers[0]] * 2)
    unfair.layers[0].o.weight.data[:, : 3 * D] = fitted.state_dict()["module.layers.0.o.weight"]
    unfair.layers[0].o.bias.data = fitted.state_dict()["module.layers.0.o.bias"]
    plain = attnopt.optimize(unfair, PruneHeads(heads=[3]), (data[0],))
    assert error(fast, model, new) < error(plain, model, new)


# ---------------------------------------------------------------- a whole layer
@pytest.mark.parametrize("compensate", ["none", "bias", "least-squares"])
def test_a_whole_layer_can_go(compensate: str, tmp_path: Path) -> None:
    """What is left of it is the same for every token: the mean of what the layer gave, or its bias."""
    model, data = stack(2), batches()
    policy = {"layers.1": PruneHeads(heads=range(H), compensate=compensate, whole_layers=True)}
    axes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    fast = optimized(model, policy, data, dynamic_shapes=axes)
    first, out = model.layers[0], model.layers[1].o
    with torch.no_grad():
        before = [x + first(x) for x in data]
        given = torch.cat([model(x) - b for x, b in zip(data, before, strict=True)]).flatten(0, 1)
        left = out.bias if compensate == "none" else given.mean(0)
        for x, b in zip(data, before, strict=True):
            torch.testing.assert_close(fast(x), b + left, atol=1e-5, rtol=1e-5)
        longer = torch.randn(3, 17, 16)
        torch.testing.assert_close(fast(longer), longer + first(longer) + left, atol=1e-5, rtol=1e-5)
    names = {name for name, _ in fast.named_parameters()}
    assert not any(f"layers.1.{role}" in name for name in names for role in "qkv")
    after = fast.report.sites[1].cost_after
    assert after is not None
    assert after.kv_bytes_per_token == 0
    fast.save(tmp_path / "saved")
    torch.testing.assert_close(attnopt.load(tmp_path / "saved")(data[0]), fast(data[0]))


def test_a_budget_may_spend_nothing_on_a_layer_that_gives_nothing() -> None:
    model, data = stack(2), batches()
    model.layers[1].o.weight.data *= 1e-4
    kept = [s.spec.num_heads for s in optimized(model, PruneHeads(0.5, whole_layers=True), data).sites]
    removed = optimized(model, PruneHeads(0.5, whole_layers=True), data).report.sites[1].notes[0]
    assert kept == [4, 1]
    assert removed == "prune-heads: every head is removed; the layer outputs the same for every token"
    assert [s.spec.num_heads for s in optimized(model, PruneHeads(0.5), data).sites] == [3, 1]
