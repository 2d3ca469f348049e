"""Block scores from clusters of calibration data: the clusters, who belongs to them, and where that may not be used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import a_site, applied, refusal
from torch import Tensor, nn

import attnopt
from attnopt.errors import CalibrationError, PluginError, PolicyError
from attnopt.ir.block_scores import BlockSample
from attnopt.ir.constant import Constant
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.routing_scores import Routing
from attnopt.ir.score_registry import parse_scores
from attnopt.ir.site import Site
from attnopt.passes import DynamicSparse, LocalWindow, PruneHeads, Sparse
from attnopt.patterns import Causal, PerHead, Window

pytestmark = pytest.mark.usefixtures("one_capture")


def a_sample(q_BHLD: Tensor, k_BHSD: Tensor, counted: int | None = None, block: int = 8) -> BlockSample:
    tokens = q_BHLD.shape[2]
    counts = (torch.arange(tokens) < (tokens if counted is None else counted)).expand(len(q_BHLD), -1)
    return DynamicBlocks(block=block).sample(q_BHLD, k_BHSD, 1.0, False, counts, counts)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- the clusters
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_clusters_that_are_there_are_found(seed: int) -> None:
    """Of four directions in each head, each is a centroid, whatever the lengths of the vectors and the seed."""
    axes = torch.linalg.qr(random(1, 2, 6, 6))[0][:, :4]  # [H, 4, D]
    which = torch.arange(48) % 4
    vectors = axes[:, which] * (1 + 5 * torch.rand(1, 2, 48, 1, generator=torch.Generator().manual_seed(2)))
    sample = a_sample(vectors, vectors.flip(2))
    centroids, bounds = (c.tensor().double() for c in Routing(4, seed=seed).fit([sample]))
    near = (centroids @ axes.mT).round(decimals=5)
    assert torch.equal(near.sort(-1).values[..., -1], torch.ones(2, 4).double())
    assert torch.equal(near.argmax(-1).sort(-1).values, torch.arange(4).expand(2, -1))
    torch.testing.assert_close(bounds, torch.ones(2, 2, 4).double(), rtol=0, atol=1e-5)


def test_centroids_are_the_means_of_their_members() -> None:
    q, k = random(3, 2, 1, 40, 4), random(4, 2, 1, 40, 4)
    (centroids, _) = (c.tensor().double() for c in Routing(3).fit([a_sample(q, k)]))
    vectors = nn.functional.normalize(torch.cat([q, k], 2).flatten(0, 2), dim=-1)
    nearest = (vectors @ centroids[0].mT).argmax(-1)
    for c in range(3):
        want = nn.functional.normalize(vectors[nearest == c].sum(0), dim=0)
        torch.testing.assert_close(centroids[0, c], want, rtol=1e-2, atol=1e-2)


def test_the_seed_decides_and_other_tokens_do_not() -> None:
    q, k = random(5, 2, 3, 40, 6), random(6, 2, 3, 40, 6)
    sample = a_sample(q, k, counted=30)
    q[:, :, 30:], k[:, :, 30:] = 99.0, -99.0
    other = a_sample(q, k, counted=30)
    assert Routing(5).fit([sample]) == Routing(5).fit([other])
    assert Routing(5).fit([sample]) != Routing(5, seed=1).fit([sample])
    assert [c.shape for c in Routing(5).fit([sample])] == [(3, 5, 6), (3, 2, 5)]


def test_bounds_take_a_fraction_of_the_calibration_data() -> None:
    q, k = random(7, 1, 2, 64, 6), random(8, 1, 2, 64, 6)
    centroids, bounds = (c.tensor().double() for c in Routing(4, width=0.5).fit([a_sample(q, k)]))
    for role, x in enumerate((q, k)):
        near = nn.functional.normalize(x[0], dim=-1) @ centroids.mT
        taken = (near >= bounds[:, role, None] - 1e-6).sum(1)
        assert torch.equal(taken, torch.full((2, 4), 64 // 8))


def test_too_little_data() -> None:
    x = random(9, 1, 1, 8, 4)
    with pytest.raises(CalibrationError, match="16 queries and keys are fewer than the 17 clusters"):
        Routing(17).fit([a_sample(x, x)])
    same = [c.tensor() for c in Routing(16).fit([a_sample(torch.ones_like(x), torch.ones_like(x))])]
    assert all(bool(t.isfinite().all()) for t in same)


# ---------------------------------------------------------------- the scores
@settings(deadline=None)
@given(st.integers(1, 4), st.sampled_from([0.3, 1.0, 1.7]), st.booleans(), st.integers(0, 9))
def test_scores_by_hand(clusters: int, width: float, balanced: bool, seed: int) -> None:
    q, k = random(seed, 1, 2, 3, 4, 5), random(seed + 99, 1, 2, 2, 4, 5)
    centroids, bounds = random(seed + 5, 2, clusters, 5), random(seed + 6, 2, 2, clusters) / 3
    scores = Routing(clusters, balanced, min(width, clusters))
    found = scores.score(q, k, torch.ones(3, 2, dtype=torch.bool), False, (centroids, bounds))
    for h in range(2):
        members: list[list[set[int]]] = []
        for role, x in enumerate((q[0, h].reshape(-1, 5), k[0, h].reshape(-1, 5))):
            members.append([])
            for c in range(clusters):
                near = [float(t @ centroids[h, c] / t.norm()) for t in x]
                wanted = -int(-(len(near) * scores.width / clusters - 1e-9) // 1)
                order = sorted(range(len(near)), key=lambda i: (-near[i], i))
                by_bound = {i for i, n in enumerate(near) if n >= bounds[h, role, c]}
                members[role].append(set(order[:wanted]) if balanced else by_bound)
        for row in range(3):
            for col in range(2):
                pairs = sum(
                    len(a & {*range(4 * row, 4 * row + 4)}) * len(b & {*range(4 * col, 4 * col + 4)})
                    for a, b in zip(*members, strict=True)
                )
                assert found[0, h, row, col] == pairs


def test_tokens_as_near_are_taken_in_their_order() -> None:
    x = torch.ones(1, 1, 4, 2, 3)
    taken = Routing(2, width=0.5).score(
        x, x, torch.ones(4, 4, dtype=torch.bool), False, (torch.ones(1, 2, 3), torch.zeros(1, 2, 2))
    )
    assert taken[0, 0].tolist() == [[8.0, 0, 0, 0], *[[0.0, 0, 0, 0]] * 3]


# ---------------------------------------------------------------- the pass
ROUTED = DynamicSparse("routing(clusters=3)", keep=2, block=4, sinks=0)
UNBALANCED = replace(ROUTED, scores=Routing(3, balanced=False))


def batches() -> list[Tensor]:
    return [random(i, 2, 24, 16).float() for i in range(4)]


def optimized(policy: Any, model: nn.Module, **options: Any) -> attnopt.OptimizedModel:
    return attnopt.optimize(model.eval(), policy, (random(77, 2, 24, 16).float(),), calibration=batches(), **options)


def a_model(causal: bool = False) -> tiny_models.Attention:
    torch.manual_seed(0)
    return tiny_models.Attention(causal=causal).eval()


def test_in_a_model(tmp_path: Path) -> None:
    model, x = a_model(), random(50, 2, 24, 16).float()
    fast = optimized(ROUTED, model)
    assert torch.equal(optimized(ROUTED, model)(x), fast(x))
    assert not torch.allclose(fast(x), model(x))
    torch.testing.assert_close(optimized(replace(ROUTED, keep=1.0), model)(x), model(x))
    fast.save(tmp_path)
    assert torch.equal(attnopt.load(tmp_path)(x), fast(x))
    before = fast.sites[0].spec.selection
    after = optimized([ROUTED, PruneHeads(heads=[0], compensate="none")], model).sites[0].spec.selection
    assert before is not None
    assert after is not None
    for part, whole in zip(after.fitted, before.fitted, strict=True):
        assert torch.equal(part.tensor(), whole.tensor()[1:])


def test_the_choice_without_balance_looks_at_nothing_later() -> None:
    model, x = a_model(causal=True), random(51, 2, 24, 16).float()
    fast = optimized(UNBALANCED, model)
    assert fast.report.sites[0].status == "rewritten"
    for cut in (3, 8, 13):
        other = torch.cat([x[:, :cut], 9 * random(52, 2, 24 - cut, 16).float()], 1)
        torch.testing.assert_close(fast(other)[:, :cut], fast(x)[:, :cut])
    assert not torch.allclose(fast(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [ROUTED, UNBALANCED], ids=["balanced", "unbalanced"])
def test_in_onnx_runtime(policy: DynamicSparse, tmp_path: Path) -> None:
    fast = optimized(policy, a_model(), dynamic_shapes="auto")
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for length in (24, 9, 37):
        x = random(length, 2, length, 16).float()
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), fast(x), rtol=1e-4, atol=1e-5)


def test_a_causal_attention_is_refused() -> None:
    text = (
        "[looks-ahead] expected block scores that depend on no later token, because the attention is causal, found "
        "Routing(clusters=16, balanced=True, width=1.0, seed=0) (at model.py:88)\n  hint: use "
        'scores="routing(balanced=False)"'
    )
    assert refusal(DynamicSparse("routing"), a_site(pattern=Causal())) == text
    chosen = DynamicBlocks("routing", block=4, fitted=[Constant.of(torch.ones(4, 2))])
    routed = a_site(selection=chosen)
    for p in (LocalWindow(3, 0), Sparse(Causal()), Sparse(Window(3, 0))):
        assert refusal(p, routed).startswith("[looks-ahead]")
    for p in (LocalWindow(3), LocalWindow(3, 0, heads=[1]), Sparse(PerHead({0: Causal()}))):
        assert applied(p, routed).spec.selection == chosen
    unbalanced = replace(chosen, scores=Routing(balanced=False))
    assert applied(LocalWindow(3, 0), a_site(selection=unbalanced)).spec.is_causal
    with pytest.raises(PolicyError, match="chooses from the whole sequence, but the attention is causal"):
        chosen.select(torch.ones(1, 4, 8, 2), torch.ones(1, 4, 8, 2), 1.0, True)


@dataclass(frozen=True)
class Later(Pass):
    name: ClassVar[str] = "acme.later"
    exact: ClassVar[bool] = False

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec.restricted(Causal()))


def test_a_pass_of_others_may_not_make_it_causal() -> None:
    with pytest.raises(PluginError, match=r"chooses from the whole sequence, but the attention is causal"):
        optimized([ROUTED, Later()], a_model())


def test_names() -> None:
    assert parse_scores("routing") == parse_scores("Routing(16, balanced=True)") == Routing()
    assert parse_scores(Routing(4, False, 2.5, 7).to_json()) == Routing(4, False, 2.5, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("clusters=0", "Routing: invalid value clusters=0: expected an integer from 1"),
        ("width=0.0", "Routing: invalid value width=0.0: expected a number above 0 and at most clusters=16"),
        ("4, width=5", "Routing: invalid value width=5: expected a number above 0 and at most clusters=4"),
        ("balanced=1", "Routing: invalid value balanced=1: expected True or False"),
        ("seed=-1", "Routing: invalid value seed=-1"),
    ],
)
def test_bad_options(options: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        DynamicSparse(f"routing({options})")
    assert message in str(caught.value)
