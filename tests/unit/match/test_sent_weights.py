"""A softmax over queries: read from any spelling, computed without a map of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import sending_models as models
import torch
import zoo
from oracle import assert_same, run
from sending_models import DECOYS, SPELLINGS, WIDTH, D, H, Sending, V, meant
from torch import Tensor, nn
from travelling import assert_travels
from variants import mostly_slow

import attnopt
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Causal, Window

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),
]
B, N = 2, 7
QUICK = (models.Reversed, models.Biased)
each = pytest.mark.parametrize("kind", mostly_slow(SPELLINGS, *QUICK), ids=lambda kind: kind.__name__)


def made(kind: type[nn.Module], length: int = N) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return zoo.loud(kind()), torch.randn(B, length, WIDTH)


@each
def test_read_and_equal_at_other_sizes(kind: type[Sending]) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto", backend="blocked")
    (site,) = fast.sites
    assert site.spec.sends
    assert str(site.spec.pattern) == "Full()"
    assert (site.num_heads, site.head_dim, site.value_dim) == (H, D, V)
    own = [f"{role}.weight" for role in ("b", "a", "v", "out")]  # who receives asks
    assert [site.projections[role].weight for role in ("q", "k", "v", "out")] == own
    assert fast.report.sites[0].backend == "blocked"
    for other in (x, *(torch.randn(b, n, WIDTH) for b, n in ((1, 1), (6, 11), (1, 300)))):
        assert_same(run(fast, (other,)), [meant(model, other)])


@each
def test_passes_by_heads_and_pairs(kind: type[Sending]) -> None:
    model, x = made(kind)
    scaled = attnopt.optimize(model, ScaleHeads((0.5, -1.0, 2.0)), (x,))
    assert_same(run(scaled, (x,)), [meant(model, x, (0.5, -1.0, 2.0))])
    pruned = attnopt.optimize(model, PruneHeads(heads=[1]), (x,))
    assert_same(run(pruned, (x,)), [meant(model, x, (1.0, 0.0, 1.0))])
    assert pruned.sites[0].num_heads == 2
    ahead = torch.arange(N) - torch.arange(N)[:, None]  # of a sender, from a receiver on
    for backend in ("auto", "blocked", "reference"):
        windowed = attnopt.optimize(model, LocalWindow(2, 1), (x,), backend=backend)
        assert_same(run(windowed, (x,)), [meant(model, x, visible=(ahead >= -2) & (ahead <= 1))])
    causal = attnopt.optimize(model, Sparse(Causal()), (x,))
    assert_same(run(causal, (x,)), [meant(model, x, visible=ahead <= 0)])
    same = attnopt.optimize(model, [LocalWindow(N), Sparse(Window(N, N))], (x,))
    assert_same(run(same, (x,)), [meant(model, x)])


def test_no_tensor_has_all_pairs() -> None:
    model, x = made(models.Reversed, 200)
    fast = attnopt.optimize(model, "fuse", (x,), backend="blocked")
    sizes = [n.meta["val"].numel() for n in fast.graph_module.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert max(sizes) < B * H * 200 * 200
    assert_same(run(fast, (x,)), [meant(model, x)])


def test_gradients_are_those_of_the_model() -> None:
    model, x = made(models.Reversed, 70)
    fast = attnopt.optimize(model, "fuse", (x,), backend="blocked")
    found = []
    for m in (fast, model):
        m.zero_grad()
        m(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for _, p in sorted(m.named_parameters())]))
    assert_same([found[0]], [found[1]])


def test_tokens_that_are_hidden_from() -> None:
    class Masked(models.Reversed):
        def forward(self, x: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
            a, b, v = self.heads(x)
            scores = (a @ b.mT * self.scale).masked_fill(~real[:, None, None, :], -torch.inf)
            return self.merged(scores.softmax(-1).mT @ v)

    model, x = made(Masked)
    real = torch.arange(N) < torch.tensor([[N], [4]])
    fast = attnopt.optimize(model, "fuse", (x, real), dynamic_shapes="auto", backend="blocked")
    assert [site.spec.sends for site in fast.sites] == [True]
    for size, left in ((N, 4), (130, 1)):
        other = torch.randn(B, size, WIDTH), torch.arange(size) < torch.tensor([[size], [left]])
        assert_same(run(fast, other), run(model, other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = made(models.Reversed, 150)
    model, x = model.to(dtype), x.to(dtype)
    fast = attnopt.optimize(model, "fuse", (x,), backend="blocked")
    found = fast(x).double()
    assert_same([found], [meant(model.double(), x.double())], limit=1e-12 if dtype == torch.float64 else 2e-2)


def test_between_two_sequences() -> None:
    """Of each token of the first to those of the second, of another length."""

    class Across(models.Reversed):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            (a, _, v), (_, b, _) = self.heads(x), self.heads(y)
            return self.merged(self.mixed(a, b, v))

    model, x = made(Across)
    given = x, torch.randn(B, 9, WIDTH)
    fast = attnopt.optimize(model, "fuse", given, dynamic_shapes="auto", backend="blocked")
    assert [(site.spec.sends, site.is_cross, site.q_len, site.kv_len) for site in fast.sites] == [(True, True, 9, N)]
    for n, m in ((N, 9), (9, N), (1, 90), (90, 1)):
        other = torch.randn(B, n, WIDTH), torch.randn(B, m, WIDTH)
        assert_same(run(fast, other), run(model, other))


@pytest.mark.slow
@pytest.mark.usefixtures("one_torchlib")
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_saved_and_in_onnx(backend: str, tmp_path: Path) -> None:
    model, x = made(models.Reversed)
    fast = attnopt.optimize(model, PruneHeads(heads=[0]), (x,), dynamic_shapes="auto", backend=backend)
    assert_travels(fast, tmp_path, [torch.randn(B, N, WIDTH), torch.randn(1, 290, WIDTH)])


def test_what_needs_a_softmax_over_keys_is_refused() -> None:
    model, x = made(models.Reversed)
    fast = attnopt.optimize(model, GroupedQuery(kv_heads=1), (x,))
    assert [r.code for r in fast.report.sites[0].refusals.values()] == ["other-softmax"]
    assert_same(run(fast, (x,)), run(model, (x,)))


@pytest.mark.parametrize("kind", DECOYS, ids=lambda kind: kind.__name__)
def test_decoys_are_not_raised(kind: type[Sending]) -> None:
    model, x = made(kind)
    found = attnopt.inspect(model, (x,), dynamic_shapes="auto")
    assert not found.sites
    assert {miss.refusal.code for miss in found.near_misses} == {DECOYS[kind]}


def test_a_softmax_over_what_is_summed_is_plain() -> None:
    class Plain(Sending):
        def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
            return (a @ b.mT * self.scale).softmax(-2).mT @ v

    model, x = made(Plain)
    (site,) = attnopt.inspect(model, (x,)).sites
    assert not site.spec.sends


class HidesAll(models.Biased):
    """Beside a table, pairs that are hidden, and a receiver that sees nothing."""

    def hidden(self, length: int) -> Tensor:
        """[receivers, senders]"""
        places = torch.arange(length)
        return ((places[:, None] * places) % 5 == 1) | (places[:, None] == 4)

    def bias(self, length: int) -> Tensor:
        return super().bias(length).masked_fill(self.hidden(length), -torch.inf)

    def mixed(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        scores = a @ b.mT * self.scale + models.Biased.bias(self, a.shape[2]).mT
        weights = scores.masked_fill(self.hidden(a.shape[2]).mT, -torch.inf).softmax(-1)
        return weights.mT @ v


@pytest.mark.slow
@pytest.mark.usefixtures("one_torchlib")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_take_turns_in_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Beside a bias and a mask, at lengths that no block divides."""
    model, x = made(HidesAll)
    model, x = model.to(dtype), x.to(dtype)
    free = {"x": {1: torch.export.Dim("n", min=2, max=400)}}
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes=free, backend="blocked")
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (form,) = json.loads(session.get_modelmeta().custom_metadata_map["attnopt.attention"])
    assert form["form"] == "senders"
    for n in (N, 128, 300):
        other = torch.randn(B, n, WIDTH, dtype=dtype)
        (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        assert_same([torch.from_numpy(found)], [meant(model, other)])
