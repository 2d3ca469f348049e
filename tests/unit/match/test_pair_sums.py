"""Scores that sum over features what is computed for each pair: phases (ComplexFormer), distances, cosines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import Edit, assert_same, run, run_edited
from torch import Tensor, nn
from torch.nn import functional as F
from travelling import assert_travels

import attnopt
from attnopt.passes import LocalWindow, PruneHeads

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),
]
B, N, H, D = 2, 6, 3, 4
WIDTH = H * D


class Pairs(nn.Module):
    """Subclasses say how scores [B, H, L, S] are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.delta, self.shift = nn.Parameter(torch.rand(H, 1, 1, D) + 0.5), nn.Parameter(torch.randn(H, 1, 1, D))
        self.speed = nn.Parameter(torch.rand(D) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made: Tensor = self.out((self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError


class Phases(Pairs):
    """Amplitudes and phases of queries and keys, turned by their distance (ComplexFormer)."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[2]
        at = torch.arange(n, dtype=q.dtype)
        apart = (at[:, None] - at[None, :])[..., None] * self.speed
        q, k = q[:, :, :, None], k[:, :, None]
        angle = self.delta * (q.tanh() - k.tanh()) + self.shift + apart
        return (q.abs() * k.abs() * torch.cos(angle)).sum(-1) / D**0.5


class PhasesLaidOut(Phases):
    """The same, with views of whole positions, a division, a commuted product and a negative sign."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[2]
        apart = (torch.arange(n).view(n, 1) - torch.arange(n).view(1, n)).to(q.dtype).view(1, 1, n, n, 1)
        q, k = q.view(-1, H, n, 1, D), k.view(-1, H, 1, n, D)
        angle = (k.tanh() - q.tanh()).neg() * self.delta + (apart * self.speed + self.shift)
        return (torch.cos(angle) * (q.abs() * k.abs() / 2)).sum(dim=-1)


class PhasesOfSines(Phases):
    """cos(x) as sin(x + pi / 2)"""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = q.unsqueeze(3), k.unsqueeze(2)
        angle = torch.sub(q.tanh() * self.delta, k.tanh(), alpha=2) + torch.pi / 2
        return (angle.sin() * q.abs().mul(k.abs())).sum(-1)


class Differences(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q[:, :, :, None] - k[:, :, None]).pow(2).sum(-1) / D**0.5


class Squares(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (k.unsqueeze(2) - q.unsqueeze(3)).square().sum(-1) * -0.25


class Distances(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -0.5 * torch.cdist(q, k) ** 2


class Cosines(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return 5 * F.cosine_similarity(q.unsqueeze(3), k.unsqueeze(2), dim=-1)


class Normalized(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 5


class DividedByNorms(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        norms = q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :]
        return 5 * (q @ k.mT / norms)


SPELLINGS = (
    Phases, PhasesLaidOut, PhasesOfSines, Differences, Squares, Distances, Cosines, Normalized, DividedByNorms,
)  # fmt: skip


def made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(B, N, WIDTH)


@pytest.mark.parametrize("kind", SPELLINGS, ids=lambda kind: kind.__name__)
def test_read_and_equal_at_other_sizes(kind: type[Pairs]) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    assert [(s.num_heads, s.spec.has_bias) for s in fast.sites] == [(H, False)]
    graph = fast.graph_module.graph
    assert all(len(n.meta["val"].shape) < 5 or 1 in n.meta["val"].shape[2:4] for n in graph.nodes if _is_tensor(n))
    for other in (x, torch.randn(1, 2, WIDTH), torch.randn(3, 11, WIDTH)):
        assert_same(run(fast, (other,)), run(model, (other,)))


def _is_tensor(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


@pytest.mark.parametrize("kind", [Phases, Distances], ids=lambda kind: kind.__name__)
def test_windows_and_pruned_heads(kind: type[Pairs]) -> None:
    model, x = made(kind)
    near = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 1
    fast = attnopt.optimize(model, [LocalWindow(1), PruneHeads(heads=[1])], (x,))
    assert_same(run(fast, (x,)), run_edited(model, (x,), None, {0: Edit(near, gains=(1.0, 0.0, 1.0))}))


@pytest.mark.usefixtures("one_torchlib")
@pytest.mark.parametrize(
    "kind", [PhasesLaidOut, pytest.param(Cosines, marks=pytest.mark.slow)], ids=lambda kind: kind.__name__
)
def test_saved_and_in_onnx(kind: type[Pairs], tmp_path: Path) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    assert_travels(fast, tmp_path, [x, torch.randn(1, 9, WIDTH)])


# ---------------------------------------------------------------- what is no such product
class ProductOfPhases(Phases):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = q[:, :, :, None], k[:, :, None]
        return (q.abs() * k.abs() * torch.cos(q * k)).sum(-1)


class CityBlock(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q[:, :, :, None] - k[:, :, None]).abs().sum(-1)


class PlainDistance(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -torch.cdist(q, k)


class SquaredCityBlock(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -(torch.cdist(q, k, p=1.0) ** 2)


class Cubes(Pairs):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q[:, :, :, None] - k[:, :, None]).pow(3).sum(-1)


class SumThenCosine(Pairs):
    """The sum over features comes before the cosine."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return 3 * torch.cos((q[:, :, :, None] - k[:, :, None]).sum(-1))


@pytest.mark.parametrize(
    "kind",
    [ProductOfPhases, CityBlock, PlainDistance, SquaredCityBlock, Cubes, SumThenCosine],
    ids=lambda kind: kind.__name__,
)
def test_other_sums_are_left_alone(kind: type[Pairs]) -> None:
    model, x = made(kind)
    found = attnopt.inspect(model, (x,))
    assert not found.sites
    assert len(found.near_misses) == 1
    fast = attnopt.optimize(model, LocalWindow(1), (x,))
    assert torch.equal(run(fast, (x,))[0], run(model, (x,))[0])


@pytest.mark.parametrize("kind", [Phases, Differences], ids=lambda kind: kind.__name__)
def test_half_precision_keeps_its_differences(kind: type[Pairs]) -> None:
    """A product would round what they take off."""
    model, x = made(kind)
    assert not attnopt.inspect(model.bfloat16(), (x.bfloat16(),)).sites


class Together(nn.Module):
    """One attention that is read, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Differences(), CityBlock()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(x))
        return made


def test_what_was_not_asked_for_keeps_its_own_sum() -> None:
    model, x = made(Together)
    fast = attnopt.optimize(model, {"first": []}, (x,))
    assert torch.equal(run(fast, (x,))[0], run(model, (x,))[0])
