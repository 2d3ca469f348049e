"""Block scores of few features: what is fitted, what is scored, and what the pass makes of calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import a_site, refusal
from torch import Tensor, nn

import attnopt
from attnopt.errors import CalibrationError, PluginError, PolicyError
from attnopt.ir.block_scores import BlockSample, BlockScores, Pooled
from attnopt.ir.constant import Constant
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.low_rank_scores import LowRank
from attnopt.ir.score_registry import parse_scores
from attnopt.ir.site import Site
from attnopt.passes import DynamicSparse, GroupedQuery, LocalWindow, PruneHeads
from attnopt.patterns import Causal

pytestmark = pytest.mark.usefixtures("one_capture")

SMALL = DynamicSparse("low-rank(rank=3, queries=2)", keep=2, block=4, sinks=0)


def a_sample(seed: int, tokens: int = 40, block: int = 8, is_causal: bool = False, counted: int = 40) -> BlockSample:
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, 3, tokens, 6, generator=g, dtype=torch.float64).unbind()
    k = k * torch.arange(1.0, 7.0) + 5
    counts = (torch.arange(tokens) < counted).expand(2, -1)
    return DynamicBlocks(block=block).sample(q, k, 0.5, is_causal, counts, counts)


# ---------------------------------------------------------------- the fit
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 2), (8, 8)])
def test_no_products_of_this_rank_are_nearer_to_the_scores(queries: int, keys: int) -> None:
    """The best matrix of a rank leaves the singular values beyond it (Eckart and Young)."""
    sample = a_sample(0)
    for rank in range(1, 7):
        maps = [c.tensor().double() for c in LowRank(rank, queries, keys).fit([sample])]
        for h in range(3):
            q = sample.q[:, h].reshape(-1, queries, 6).mean(1)
            k = sample.k[:, h].reshape(2, -1, keys, 6).mean(2)
            k = (k - k.mean(1, keepdim=True)).flatten(0, 1)
            scores = q @ k.mT
            error = (q @ maps[0][h] @ maps[1][h].mT @ k.mT - scores).norm() ** 2
            least = torch.linalg.svdvals(scores)[rank:].square().sum()
            torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-7 * float(scores.norm() ** 2))


@pytest.mark.parametrize("is_causal", [True, False])
def test_only_tokens_that_count_are_fitted(is_causal: bool) -> None:
    sample = a_sample(1, is_causal=is_causal, counted=29)
    other = replace(
        sample,
        q=sample.q.masked_fill(~sample.q_counts[:, None, ..., None], 99.0),
        k=sample.k.masked_fill(~sample.k_counts[:, None, ..., None], -99.0),
    )
    scores = LowRank(2, 4, 2)
    assert scores.fit([sample]) == scores.fit([other]) != scores.fit([a_sample(1, is_causal=is_causal)])
    assert int(sample.k_counts.sum()) == 2 * 29
    assert int(sample.q_counts.sum()) == 2 * 29


def test_a_causal_row_is_fitted_as_it_is_scored() -> None:
    """Row r holds the queries up to its first one: of 40 tokens, 33; nothing is counted twice."""
    sample = a_sample(2, is_causal=True)
    assert sample.q.shape == (2, 3, 5, 8, 6)
    assert sample.q_counts[0].sum(1).tolist() == [1, 8, 8, 8, 8]
    assert sample.known.sum(1).tolist() == [0, 1, 2, 3, 4]


def test_all_batches_are_fitted_at_once() -> None:
    one, two = a_sample(3), a_sample(4)
    both = BlockSample(torch.cat([one.q, two.q]), torch.cat([one.k, two.k]), one.known, False,
                       torch.cat([one.q_counts, two.q_counts]), torch.cat([one.k_counts, two.k_counts]))  # fmt: skip
    for a, b in zip(LowRank(2).fit([one, two]), LowRank(2).fit([both]), strict=True):
        torch.testing.assert_close(a.tensor(), b.tensor())


def test_keys_that_are_all_the_same_say_nothing() -> None:
    sample = a_sample(5)
    maps = LowRank(2, 1).fit([replace(sample, k=torch.ones_like(sample.k))])
    assert all(bool(c.tensor().isfinite().all()) for c in maps)
    assert not maps[1].tensor().any()


def test_too_little_data() -> None:
    with pytest.raises(CalibrationError, match="4 calibration tokens are fewer than the 6 features of a head"):
        LowRank(2).fit([a_sample(0, counted=2)])


# ---------------------------------------------------------------- the scores
def test_scores_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, 5, generator=g).double(), torch.randn(1, 2, 4, 8, 5, generator=g).double()
    maps = torch.randn(2, 2, 5, 2, generator=g).double().unbind()
    known = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
    found = LowRank(2, 4, 2).score(q, k, known, False, maps)
    for h in range(2):
        for row in range(3):
            want = torch.zeros(4, dtype=torch.float64)
            for a in range(2):
                mean = q[0, h, row, 4 * a : 4 * a + 4].mean(0) @ maps[0][h]
                logits = torch.full((4, 4), -torch.inf, dtype=torch.float64)
                for col in range(4):
                    for b in range(4):
                        if known[row, col]:
                            logits[col, b] = mean @ (k[0, h, col, 2 * b : 2 * b + 2].mean(0) @ maps[1][h])
                want += logits.flatten().softmax(0).reshape(4, 4).sum(1)
            torch.testing.assert_close(found[0, h, row], want)


def test_all_features_of_all_tokens_give_the_attention() -> None:
    sample, scores = a_sample(6), LowRank(1.0, 1, 1)
    maps = [c.tensor().double() for c in scores.fit([sample])]
    found = scores.score(sample.q, sample.k, sample.known, False, maps)
    weights = (sample.q.flatten(2, 3) @ sample.k.flatten(2, 3).mT).softmax(-1)
    want = weights.reshape(2, 3, 5, 8, 5, 8).sum((3, 5))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 6), st.sampled_from([0.1, 0.34, 0.5, 1.0]))
def test_ranks(count: int, fraction: float) -> None:
    sample = a_sample(7)
    assert LowRank(count).fit([sample])[0].shape == (3, 6, count)
    assert LowRank(count + 6).fit([sample])[1].shape == (3, 6, 6)
    wanted = {0.1: 1, 0.34: 3, 0.5: 3, 1.0: 6}[fraction]
    assert [c.shape for c in LowRank(fraction).fit([sample])] == 2 * [(3, 6, wanted)]


def test_names() -> None:
    for text in ("low-rank", "LowRank", "lowrank()", "low-rank(rank=0.25)", " low-rank(0.25, queries=8, keys=1)"):
        assert parse_scores(text) == LowRank()
    assert str(DynamicSparse("low-rank(rank=4)").scores) == "LowRank(rank=4, queries=8, keys=1)"
    assert attnopt.Policy.of("dynamic-sparse(scores='low-rank(rank=4)', block=32)") == attnopt.Policy.of(
        DynamicSparse(LowRank(4), block=32)
    )


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("low-rnk", "unknown block score 'lowrnk'; available: Pooled, Antidiagonal, KMeans, LowRank, Routing"),
        ("low-rank(rank=0)", "LowRank: invalid value rank=0: expected an integer from 1"),
        ("low-rank(rank=1.5)", "LowRank: invalid value rank=1.5: expected an integer from 1, or a fraction above 0"),
        ("low-rank(rank=True)", "LowRank: invalid value rank=True"),
        ("low-rank(queries=0)", "LowRank: invalid value queries=0"),
        ("low-rank(keys=3)", "LowRank: keys=3 does not divide blocks of 64 tokens"),
        ("low-rank(queries=5)", "LowRank: queries=5 does not divide blocks of 64 tokens"),
        ("low-rank(stride=5)", "lowrank takes rank, queries, keys"),
    ],
)
def test_bad_options(scores: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        DynamicSparse(scores)
    assert message in str(caught.value)


def test_scores_that_were_not_fitted() -> None:
    with pytest.raises(PolicyError, match=r"has not been fitted\n  hint: apply the pass dynamic-sparse with calib"):
        DynamicBlocks("low-rank", block=8).select(torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2), 1.0, False)


# ---------------------------------------------------------------- the pass
def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def optimized(policy: Any, model: nn.Module | None = None, **options: Any) -> attnopt.OptimizedModel:
    torch.manual_seed(0)
    model = tiny_models.Attention() if model is None else model
    given_ = {"calibration": batches(), **options}
    return attnopt.optimize(model.eval(), policy, (torch.randn(2, 24, 16),), **given_)


def fitted(fast: attnopt.OptimizedModel, site: int = 0) -> DynamicBlocks:
    selection = fast.sites[site].spec.selection
    assert selection is not None
    return selection


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_kept_pairs_are_those_with_the_highest_scores(is_causal: bool) -> None:
    """An oracle that reads nothing but the model's weights and the fitted maps."""
    model, x = tiny_models.Attention(causal=is_causal).eval(), torch.randn(2, 24, 16)
    fast = optimized(SMALL, model)
    map_q, map_k = (c.tensor() for c in fitted(fast).fitted)
    q, k, v = (f(x).detach().unflatten(-1, (2, 8)).transpose(1, 2) for f in (model.q, model.k, model.v))
    seen = torch.zeros(2, 2, 24, 24, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            for row in range(6):
                last = 4 * row if is_causal else 4 * row + 3
                places = [max(0, i) for i in range(last - 3, last + 1)]
                scored = range(row) if is_causal else range(6)
                sums = dict.fromkeys(scored, 0.0)
                for half in (places[:2], places[2:]) if sums else ():
                    mean = q[b, h, half].mean(0) * 8**-0.5 @ map_q[h]
                    logits = torch.stack([k[b, h, 4 * col : 4 * col + 4] @ map_k[h] @ mean for col in scored])
                    for col, weight in zip(scored, logits.flatten().softmax(0).reshape(-1, 4).sum(1), strict=True):
                        sums[col] += float(weight)
                others = sorted((col for col in scored if col != row), key=lambda col: -sums[col])
                for col in (row, *others[:1]):
                    seen[b, h, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = True
    if is_causal:
        seen &= Causal().mask(24, 24)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(fast(x), model.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def test_all_blocks_change_nothing() -> None:
    model, x = tiny_models.Attention().eval(), torch.randn(2, 24, 16)
    torch.testing.assert_close(optimized(replace(SMALL, keep=1.0), model)(x), model(x))


def test_the_same_data_give_the_same_bits(tmp_path: Path) -> None:
    x = torch.randn(2, 24, 16)
    fast, again = optimized(SMALL), optimized(SMALL)
    assert fitted(fast) == fitted(again)
    assert fitted(fast) != fitted(optimized(SMALL, calibration=batches(3)))
    assert torch.equal(fast(x), again(x))
    fast.save(tmp_path)
    loaded = attnopt.load(tmp_path)
    assert torch.equal(loaded(x), fast(x))
    assert loaded.sites[0].spec == fast.sites[0].spec
    assert fitted(loaded).fitted == fitted(fast).fitted


@pytest.mark.slow
def test_in_onnx_runtime(tmp_path: Path) -> None:
    fast = optimized(SMALL, tiny_models.Stack(), dynamic_shapes="auto")
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for length in (24, 9, 37):
        x = torch.randn(2, length, 16)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), fast(x), rtol=1e-4, atol=1e-5)


def test_tokens_that_are_held_back_are_not_fitted() -> None:
    """Of eight sequences, the last one."""
    data = batches()
    fast = optimized(SMALL, calibration=data)
    data[3] = torch.cat([data[3][:1], 9 * data[3][1:]])
    assert fitted(optimized(SMALL, calibration=data)) == fitted(fast)
    data[3] = 2 * data[3]
    assert fitted(optimized(SMALL, calibration=data)) != fitted(fast)


def test_half_precision() -> None:
    torch.manual_seed(0)
    model, x = tiny_models.Attention().eval().bfloat16(), torch.randn(2, 24, 16).bfloat16()
    fast = attnopt.optimize(model, SMALL, (x,), calibration=[b.bfloat16() for b in batches()])
    assert {c.dtype for c in fitted(fast).fitted} == {"float32"}
    assert fast(x).dtype == torch.bfloat16


def test_removed_heads_take_their_part_with_them() -> None:
    fast = optimized([SMALL, PruneHeads(heads=[0], compensate="none")])
    before, after = fitted(optimized(SMALL)), fitted(fast)
    for whole, part in zip(before.fitted, after.fitted, strict=True):
        assert torch.equal(part.tensor(), whole.tensor()[1:])
    other = optimized([PruneHeads(heads=[0], compensate="none"), SMALL])
    x = torch.randn(2, 24, 16)
    torch.testing.assert_close(other(x), fast(x))


def test_the_keys_of_groups_are_fitted_after_they_were_merged() -> None:
    torch.manual_seed(0)
    merged = optimized([GroupedQuery(1, merge="score-optimal"), replace(SMALL, keep=1.0)])
    assert merged.report.sites[0].refusals == {}
    assert optimized([replace(SMALL, keep=1.0), GroupedQuery(1)]).report.sites[0].refusals["grouped-query"].code == (
        "already-selected"
    )
    x = torch.randn(2, 24, 16)
    torch.testing.assert_close(merged(x), optimized(GroupedQuery(1, merge="score-optimal"))(x))
    assert fitted(merged) != replace(fitted(optimized(SMALL)), keep=1.0)


def test_calls_of_one_module_share_a_fit() -> None:
    attention = tiny_models.Attention()
    fast = optimized(SMALL, nn.Sequential(attention, attention))
    assert fitted(fast, 0) == fitted(fast, 1)
    assert fitted(fast, 0) != fitted(optimized(SMALL, attention))


def test_it_is_reported() -> None:
    """The recall on what is held back: with eight sequences, the last one."""
    model = tiny_models.Attention().eval()
    fast = optimized([LocalWindow(9), SMALL], model)
    site, o = fast.sites[0], batches()[3][1:]
    q, k = (f(o).unflatten(-1, (2, 8)).transpose(1, 2) for f in (model.q, model.k))
    mass = attnopt.kept_mass(q, k, site.spec)[0]
    least = int(mass.argmin())
    text = f"{mass.mean():.1%} attention recall on held-out calibration data, lowest in head {least}: {mass[least]:.1%}"
    told = [note for note in fast.report.sites[0].notes if "recall" in note]
    assert told == [text]
    assert "scores=LowRank(rank=3, queries=2, keys=1), keep=2, block=4, sinks=0" in str(fast.report)


def test_without_data() -> None:
    text = (
        "[needs-calibration] expected calibration data, found none (at model.py:88)\n"
        '  hint: pass calibration= to attnopt.optimize, or use scores="antidiagonal"'
    )
    assert refusal(DynamicSparse("low-rank"), a_site()) == text
    assert DynamicSparse("antidiagonal").check(a_site()) is None
    assert DynamicSparse("low-rank").calibrates
    assert not DynamicSparse().calibrates
    few = [torch.randn(1, 6, 16)]
    with pytest.raises(CalibrationError, match="5 calibration tokens are fewer than the 8 features of a head"):
        optimized(SMALL, calibration=few, dynamic_shapes="auto")


# ---------------------------------------------------------------- scores and passes of others
@dataclass(frozen=True)
class Axes(BlockScores):
    """Products of mean queries and keys, with weights of features."""

    needs_calibration: ClassVar[bool] = True
    made: ClassVar[Any] = None

    def fit(self, samples: Sequence[BlockSample]) -> tuple[Constant, ...]:
        found: tuple[Constant, ...] = type(self).made(samples)
        return found

    def score(
        self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool, constants: Sequence[Tensor] = ()
    ) -> Tensor:
        (weights,) = constants
        return (q_BHNTD.mean(3) * weights[:, None]) @ k_BHMTD.mean(3).mT


def with_axes(monkeypatch: pytest.MonkeyPatch, made: Any) -> DynamicSparse:
    monkeypatch.setattr(Axes, "made", staticmethod(made))
    return replace(SMALL, scores=Axes())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda samples: (), r"fit returned \(\), expected a tuple of Constants"),
        (lambda samples: torch.ones(2), r"fit returned tensor\(.*expected a tuple of Constants"),
        (lambda samples: (Constant.of(torch.ones(3)),), r"shape=\(3,\)\), expected finite numbers for each of 2 heads"),
        (lambda samples: (Constant.of(torch.full((2,), torch.nan)),), "expected finite numbers for each of 2 heads"),
        (lambda samples: 1 / 0, "fit failed: ZeroDivisionError"),
    ],
)
def test_faults_of_other_scores(made: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match=message):
        optimized(with_axes(monkeypatch, made))


def test_other_scores_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 24, 16)
    of_ones = with_axes(monkeypatch, lambda samples: (Constant.of(torch.ones(2, samples[0].q.shape[-1])),))
    torch.testing.assert_close(optimized(of_ones)(x), optimized(replace(SMALL, scores=Pooled()))(x))


@dataclass(frozen=True)
class Unfitted(Pass):
    name: ClassVar[str] = "acme.unfitted"
    exact: ClassVar[bool] = False

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(replace(site.spec, selection=DynamicBlocks("low-rank", block=8)))


@dataclass(frozen=True)
class NewKeys(Pass):
    name: ClassVar[str] = "acme.new-keys"
    exact: ClassVar[bool] = False

    def rewrite(self, site: Site) -> Rewrite:
        weight = site.head_weight("k", 0)
        assert weight is not None
        return Rewrite(site.spec, (HeadWeights("k", 0, 2 * weight),))


@dataclass(frozen=True)
class OtherHeads(Pass):
    name: ClassVar[str] = "acme.other-heads"
    exact: ClassVar[bool] = False

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(replace(site.spec, heads=(1,), kv_of_head=(1,)))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([Unfitted()], r"DynamicBlocks\(scores=LowRank.*\) has to be fitted to calibration data first"),
        ([SMALL, NewKeys()], r"new weights of queries or keys, but DynamicBlocks.* was fitted to the old ones"),
        ([SMALL, OtherHeads()], r"DynamicBlocks.* was fitted for other heads than \(1,\)"),
    ],
)
def test_faults_of_other_passes(policy: list[Pass], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        optimized(policy)
