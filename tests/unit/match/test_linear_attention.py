"""Attentions without a softmax: linear attention with and without decay, read from either order of its products."""

from __future__ import annotations

import copy
from pathlib import Path

import linear_models as models
import pytest
import torch
import zoo
from linear_decoys import DECOYS, Agents, Gated, Gram, Ones, WithState
from linear_models import SPELLINGS, WIDTH, D, H, Linear, meant
from oracle import assert_same, run
from torch import Tensor, nn
from travelling import assert_travels
from variants import mostly_slow

import attnopt
from attnopt.errors import PolicyError
from attnopt.passes import DynamicSparse, GroupedQuery, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Causal, Window

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),
]
B, N = 2, 7
QUICK = (models.Retention, models.StateFirst, models.CausalState)
QUICK_DECOYS = (Gated, Gram, Ones, WithState)


each = pytest.mark.parametrize("kind", mostly_slow(SPELLINGS, *QUICK), ids=lambda kind: kind.__name__)


def made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return zoo.loud(kind()), torch.randn(B, N, WIDTH)


@each
def test_read_and_equal_at_other_sizes(kind: type[Linear]) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    (site,) = fast.sites
    linear = site.spec.linear
    assert linear is not None
    assert linear.rates == pytest.approx(kind.rates if any(kind.rates) else (), rel=1e-5)
    assert (linear.divides, linear.added, linear.least) == (kind.divides, kind.added, kind.least)
    assert (linear.absolute, linear.detached) == (kind.absolute, kind.absolute)
    assert str(site.spec.pattern) == ("Causal()" if kind.causal else "Full()")
    assert site.spec.scale in (1.0, kind.scale)
    assert (site.num_heads, site.head_dim, site.value_dim) == (H, D, models.V)
    own = [f"{role}.weight" for role in ("q", "k", "v", "out")]
    assert [site.projections[role].weight for role in ("q", "k", "v", "out")] == own
    assert fast.report.sites[0].backend == "chunked"
    lengths = (1, 11, 63) if kind is models.Stored else (1, 11, 300)
    for other in (x, *(torch.randn(b, n, WIDTH) for b, n in zip((1, 6, 1), lengths, strict=True))):
        assert_same(run(fast, (other,)), [meant(model, other)])


@each
def test_passes_by_heads_and_pairs(kind: type[Linear]) -> None:
    model, x = made(kind)
    scaled = attnopt.optimize(model, ScaleHeads((0.5, -1.0, 2.0)), (x,))
    assert_same(run(scaled, (x,)), [meant(model, x, (0.5, -1.0, 2.0))])
    pruned = attnopt.optimize(model, PruneHeads(heads=[1]), (x,))
    assert_same(run(pruned, (x,)), [meant(model, x, (1.0, 0.0, 1.0))])
    assert pruned.sites[0].num_heads == 2
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    steps = torch.arange(N)[:, None] - torch.arange(N)
    ahead = 0 if kind.causal else 2
    windowed = attnopt.optimize(model, LocalWindow(2), (x,))
    assert_same(run(windowed, (x,)), [meant(model, x, visible=(steps <= 2) & (steps >= -ahead))])
    same = attnopt.optimize(model, [LocalWindow(N), Sparse(Window(N, N))], (x,))
    assert_same(run(same, (x,)), [meant(model, x)])


def test_rows_without_keys_give_zeros() -> None:
    model, x = made(models.StateByMatmul)
    fast = attnopt.optimize(model, Sparse(Causal() & ~Window(1, 1)), (x,))
    steps = torch.arange(N)[:, None] - torch.arange(N)
    assert_same(run(fast, (x,)), [meant(model, x, visible=steps > 1)])


@pytest.mark.slow
@pytest.mark.usefixtures("one_torchlib")
@pytest.mark.parametrize("kind", [models.Retention, models.StateFirst], ids=lambda kind: kind.__name__)
def test_saved_and_in_onnx(kind: type[Linear], tmp_path: Path) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, PruneHeads(heads=[0]), (x,), dynamic_shapes="auto")
    assert_travels(fast, tmp_path, [torch.randn(B, N, WIDTH), torch.randn(1, 290, WIDTH)])


def test_no_gradient_flows_to_what_is_detached() -> None:
    model, x = made(models.Normalised)[0], torch.randn(1, 300, WIDTH)
    fast = attnopt.optimize(model, "fuse", (x,), backend="chunked")
    found = []
    for m in (fast, model):
        m.zero_grad()
        m(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for _, p in sorted(m.named_parameters())]))
    assert_same([found[0]], [found[1]])


def test_what_needs_a_softmax_is_refused() -> None:
    model, x = made(models.Lightning)
    policies = (
        DynamicSparse(),
        GroupedQuery(kv_heads=1),
        PruneHeads(0.4, importance="output-norm"),
        Sparse(Window(1, 1), zero_pad=True),
    )
    for policy in policies:
        fast = attnopt.optimize(model, policy, (x,))
        (refusal,) = fast.report.sites[0].refusals.values()
        assert refusal.code == "no-softmax"
        assert_same(run(fast, (x,)), run(model, (x,)))
    with pytest.raises(PolicyError, match="no softmax"):
        attnopt.collect(model, [x], "weights")


def test_optimized_again_it_is_left_alone() -> None:
    """Its chunks are no attentions of their own."""
    model, x = made(models.Retention)[0], torch.randn(1, 300, WIDTH)
    fast = attnopt.optimize(model, "fuse", (x,))
    again = attnopt.inspect(fast, (x,))
    assert not again.sites
    assert {miss.refusal.code for miss in again.near_misses} == {"in-pieces"}


def test_double_precision_is_exact() -> None:
    model, x = made(models.Retention)[0].double(), torch.randn(1, 700, WIDTH, dtype=torch.float64)
    fast = attnopt.optimize(model, "fuse", (x,))
    with torch.no_grad():
        assert_same([fast(x)], [meant(model, x)], limit=1e-12)


# ---------------------------------------------------------------- what looks alike
@pytest.mark.parametrize("kind", mostly_slow(DECOYS, *QUICK_DECOYS), ids=lambda kind: kind.__name__)
def test_decoys_are_not_raised(kind: type[Linear]) -> None:
    model, x = made(kind)
    found = attnopt.inspect(model, (x,), dynamic_shapes="auto")
    assert not found.sites
    assert {miss.refusal.code for miss in found.near_misses} == DECOYS[kind]
    fast = attnopt.optimize(model, PruneHeads(heads=[0]), (x,), dynamic_shapes="auto")
    assert_same(run(fast, (x,)), run(model, (x,)), limit=0.0)


def test_softmax_attentions_are_found_as_before() -> None:
    model, x = made(Agents)
    found = attnopt.inspect(model, (x,))
    assert [site.spec.linear for site in found.sites] == [None, None]
    assert not found.near_misses


def test_padding_of_keys_and_pairs() -> None:
    class Padded(models.Quadratic):
        def forward(self, x: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = self.heads(x)
            weights = (q @ k.mT).masked_fill(~real[:, None, None, :], 0.0)
            return self.merged(weights @ v / (weights.sum(-1, keepdim=True) + self.added))

    model, x = made(Padded)
    real = torch.arange(N) < torch.tensor([[N], [4]])
    fast = attnopt.optimize(model, "fuse", (x, real), dynamic_shapes="auto")
    assert fast.sites[0].spec.linear is not None
    assert fast.report.sites[0].backend == "chunked"
    assert_same(run(fast, (x, real)), run(model, (x, real)))
    other = (torch.randn(B, 200, WIDTH), torch.arange(200) < torch.tensor([[150], [1]]))
    assert_same(run(fast, other), run(model, other))


def test_between_two_sequences() -> None:
    class Across(models.Quadratic):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            (q, _, _), (_, k, v) = self.heads(x), self.heads(y)
            return self.merged(self.mixed(q, k, v))

    model, x = made(Across)
    given = x, torch.randn(B, 9, WIDTH)
    fast = attnopt.optimize(model, PruneHeads(heads=[1]), given, dynamic_shapes="auto")
    (site,) = fast.sites
    assert (site.num_heads, site.is_cross, site.q_len, site.kv_len) == (2, True, N, 9)
    assert site.spec.linear is not None
    whole = attnopt.optimize(model, "fuse", given, dynamic_shapes="auto")
    columns = torch.ones(H, models.V).index_fill(0, torch.tensor([1]), 0.0).flatten()
    for n, m in ((N, 9), (9, N), (1, 90), (90, 1)):
        other = torch.randn(6, n, WIDTH), torch.randn(6, m, WIDTH)
        assert_same(run(whole, other), run(model, other))
        without = copy.deepcopy(model)
        without.out.weight.data *= columns
        assert_same(run(fast, other), run(without, other))
