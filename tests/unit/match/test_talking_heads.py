"""Talking heads: scores and weights that are mapped across heads (CaiT, arXiv:2003.02436)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from oracle import Edit, assert_same, run, run_edited
from torch import Tensor, nn
from travelling import assert_travels

import attnopt
from attnopt.errors import PolicyError
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Causal, PerHead

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),
]
B, N, H, D = 2, 6, 3, 4
WIDTH = H * D


class Talking(nn.Module):
    """Subclasses say how scores and weights [B, H, L, S] are mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.first, self.second = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = self.of_scores(q @ k.mT / 2)
        weights = self.of_weights(scores.softmax(-1))
        made: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return made

    def of_scores(self, x: Tensor) -> Tensor:
        return x

    def of_weights(self, x: Tensor) -> Tensor:
        return x


class Linear(Talking):
    """As CaiT writes it, with a bias."""

    def of_scores(self, x: Tensor) -> Tensor:
        made: Tensor = self.first(x.permute(0, 2, 3, 1))
        return made.permute(0, 3, 1, 2)

    def of_weights(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(x.permute(0, 2, 3, 1))
        return made.permute(0, 3, 1, 2)


class Convolution(Talking):
    """As x-transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(H, H, 1, bias=False), nn.Conv2d(H, H, 1)  # type: ignore[assignment]

    def of_scores(self, x: Tensor) -> Tensor:
        made: Tensor = self.first(x)
        return made

    def of_weights(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(x)
        return made


class Einsum(Talking):
    """Matrices in either order, a causal mask in between."""

    def of_scores(self, x: Tensor) -> Tensor:
        made = torch.einsum("bgij,gh->bhij", x, self.first.weight)
        hidden = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
        return made.masked_fill(hidden, -torch.inf)

    def of_weights(self, x: Tensor) -> Tensor:
        return torch.einsum("hg,bgij->bhij", self.second.weight, x)


class Product(Talking):
    """The matrix times all pairs of queries and keys at once."""

    def of_scores(self, x: Tensor) -> Tensor:
        return (self.first.weight @ x.flatten(2)).view_as(x) * 0.5

    def of_weights(self, x: Tensor) -> Tensor:
        return (self.second.weight @ x.flatten(2)).view_as(x)


class BiasBefore(Linear):
    """A bias of the heads that are mapped (EfficientFormerV2), before a factor and between two biases."""

    def of_scores(self, x: Tensor) -> Tensor:
        bias = self.first.bias[:, None, None] * torch.arange(x.shape[-1]) + torch.arange(x.shape[-2])[:, None] % 3
        return 0.5 * super().of_scores(x + bias) - torch.arange(x.shape[-1]) / 7


class BiasOfAllBefore(Einsum):
    """The same bias for all heads, which their map tells apart, and a mask after it."""

    def of_scores(self, x: Tensor) -> Tensor:
        return super().of_scores((x - torch.arange(x.shape[-1]).cos() * 3) * 2)


class ScoresAlone(Linear):
    def of_weights(self, x: Tensor) -> Tensor:
        return x


class WeightsAlone(Convolution):
    def of_scores(self, x: Tensor) -> Tensor:
        return x


SPELLINGS = (Linear, Convolution, Einsum, Product, BiasBefore, BiasOfAllBefore, ScoresAlone, WeightsAlone)
each = pytest.mark.parametrize("kind", SPELLINGS, ids=lambda kind: kind.__name__)


def made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return zoo.loud(kind()), torch.randn(B, N, WIDTH)


@each
def test_read_and_equal_at_other_sizes(kind: type[Talking]) -> None:
    model, x = made(kind)
    gains = (0.5, -1.0, 2.0)
    fast = attnopt.optimize(model, ScaleHeads(gains), (x,), dynamic_shapes="auto")
    (site,) = fast.sites
    assert (site.spec.has_score_map, site.spec.has_weight_map) == (kind != WeightsAlone, kind != ScoresAlone)
    assert (site.num_heads, str(site.spec.visible_pattern)) == (H, "Causal()" if issubclass(kind, Einsum) else "Full()")
    meant = copy.deepcopy(model)
    with torch.no_grad():
        meant.out.weight *= torch.tensor(gains).repeat_interleave(D)  # type: ignore[union-attr, operator]
    for other in (x, torch.randn(1, 9, WIDTH)):
        assert_same(run(fast, (other,)), run(meant, (other,)))


@each
def test_windows_hide_scores_that_are_mapped(kind: type[Talking]) -> None:
    model, x = made(kind)
    near = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 1
    windowed = attnopt.optimize(model, LocalWindow(1), (x,))
    assert_same(run(windowed, (x,)), run_edited(model, (x,), None, {0: Edit(near)}))
    of_one = torch.ones(H, N, N, dtype=torch.bool)
    of_one[1] = torch.ones(N, N, dtype=torch.bool).tril()
    causal = attnopt.optimize(model, Sparse(PerHead({1: Causal()})), (x,))
    assert_same(run(causal, (x,)), run_edited(model, (x,), None, {0: Edit(of_one)}))


@pytest.mark.usefixtures("one_torchlib")
def test_saved_and_in_onnx(tmp_path: Path) -> None:
    model, x = made(Linear)
    fast = attnopt.optimize(model, LocalWindow(2), (x,), dynamic_shapes="auto")
    assert_travels(fast, tmp_path, [torch.randn(B, N, WIDTH), torch.randn(1, 9, WIDTH)])


def test_what_needs_heads_of_their_own_is_refused() -> None:
    model, x = made(Linear)
    for policy in (PruneHeads(heads=[0]), GroupedQuery(kv_heads=1)):
        fast = attnopt.optimize(model, policy, (x,))
        (refusal,) = fast.report.sites[0].refusals.values()
        assert refusal.code == "talking-heads"
        assert_same(run(fast, (x,)), run(model, (x,)))
    with pytest.raises(PolicyError, match="talking heads"):
        attnopt.collect(model, [x], "weights")


class MaskBefore(Linear):
    """Infinite scores are mapped: left to the model."""

    def of_scores(self, x: Tensor) -> Tensor:
        return super().of_scores(x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool).triu(1), -torch.inf))


class CapBefore(Linear):
    def of_scores(self, x: Tensor) -> Tensor:
        return super().of_scores(x.tanh())


class MappedTwice(Linear):
    def of_scores(self, x: Tensor) -> Tensor:
        return super().of_scores(super().of_scores(x))


@pytest.mark.parametrize("kind", [MaskBefore, CapBefore, MappedTwice], ids=lambda kind: kind.__name__)
def test_what_no_map_of_the_product_amounts_to_is_told(kind: type[Talking]) -> None:
    model, x = made(kind)
    found = attnopt.inspect(model, (x,))
    assert not found.sites
    assert len(found.near_misses) == 1


@pytest.mark.slow
def test_cait_at_other_batch_sizes() -> None:
    model, args, _ = zoo.cait()
    fast = attnopt.optimize(model, LocalWindow(1), args, dynamic_shapes={"x": {0: torch.export.Dim("b")}})
    assert [s.spec.mixes_heads for s in fast.sites] == [True, False, False]
    length = fast.sites[0].q_len
    near = (torch.arange(length)[:, None] - torch.arange(length)).abs() <= 1
    for batch in (2, 1, 4):
        x = torch.randn(batch, *args[0].shape[1:])
        assert_same(run(fast, (x,)), run_edited(model, (x,), None, {0: Edit(near)}))
