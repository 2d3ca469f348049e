"""Scores that are clamped before the softmax, as detectors with text do against overflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import assert_same, run
from torch import Tensor, nn
from travelling import assert_travels
from variants import mostly_slow

import attnopt
from attnopt.match.clamped_scores import joined, scaled
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),
]
B, N, H, D, WIDTH = 2, 7, 3, 4, 12
LEAST = torch.finfo(torch.float32).min


class Clamped(nn.Module):
    """Scores go through ``change`` before the softmax."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return 6 * q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        made: Tensor = self.out((self.change(q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made


# ---------------------------------------------------------------- each with the bounds of the scaled scores
SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float | None, float | None]]] = {
    "both": (lambda s: (s / 2).clamp(-1.0, 0.5), (-1.0, 0.5)),
    "one after the other": (lambda s: (s / 2).clamp(min=-1.0).clamp(max=0.5), (-1.0, 0.5)),
    "from above": (lambda s: torch.clamp(s * 0.5, max=0.25), (None, 0.25)),
    "scaled later": (lambda s: torch.clamp_max(s, 1.0).clamp_min(-2.0) * 0.5, (-1.0, 0.5)),
    "negated": (lambda s: -(s / -2).clamp(-0.5, 1.0), (-1.0, 0.5)),
    "crossed": (lambda s: (s / 2).clamp(1.0, 0.25), (0.25, 0.25)),
    "extrema": (lambda s: torch.minimum(torch.tensor(0.5), torch.maximum(s / 2, torch.tensor(-1.0))), (-1.0, 0.5)),
}
each = pytest.mark.parametrize("name", mostly_slow(SPELLINGS, "both", "negated"))


def made(change: Callable[[Tensor], Tensor]) -> tuple[Clamped, Tensor]:
    torch.manual_seed(0)
    return Clamped(change).eval(), torch.randn(B, N, WIDTH)


def meant(
    model: Clamped,
    x: Tensor,
    bounds: tuple[float | None, float | None],
    gain: float = 1.0,
    visible: Tensor | None = None,
) -> Tensor:
    q, k, v = model.heads(x)
    s = (q @ k.mT / 2).clamp(*bounds)
    assert not torch.equal(s, q @ k.mT / 2), "no score is beyond the bounds"
    s = s if visible is None else s.masked_fill(~visible, -math.inf)
    o = s.softmax(-1) @ v * torch.tensor([gain, 1.0, 1.0])[:, None, None]
    return model.out(o.transpose(1, 2).flatten(2))


@each
def test_read_and_equal_at_other_sizes(name: str) -> None:
    change, bounds = SPELLINGS[name]
    model, x = made(change)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto", backend="reference")
    (site,) = fast.sites
    assert site.spec.clamp == pytest.approx(bounds)
    assert abs(site.spec.scale) == 0.5
    for other in (x, torch.randn(3, 11, WIDTH), torch.randn(1, 130, WIDTH)):
        assert_same(run(fast, (other,)), [meant(model, other, bounds)])


def test_passes_by_heads_and_pairs() -> None:
    change, bounds = SPELLINGS["both"]
    model, x = made(change)
    for policy, gain in ((ScaleHeads({0: 3.0}), 3.0), (PruneHeads(heads=[0]), 0.0)):
        assert_same(run(attnopt.optimize(model, policy, (x,)), (x,)), [meant(model, x, bounds, gain)])
    fast = attnopt.optimize(model, LocalWindow(2), (x,))
    ahead = torch.arange(N) - torch.arange(N)[:, None]
    assert_same(run(fast, (x,)), [meant(model, x, bounds, visible=ahead.abs() <= 2)])
    kept = attnopt.optimize(model, GroupedQuery(kv_heads=1), (x,))
    assert [r.code for r in kept.report.sites[0].refusals.values()] == ["other-softmax"]
    assert_same(run(kept, (x,)), run(model, (x,)), limit=0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("one_torchlib")
def test_saved_and_in_onnx(tmp_path: Path) -> None:
    model, x = made(SPELLINGS["from above"][0])
    fast = attnopt.optimize(model, PruneHeads(heads=[0]), (x,), dynamic_shapes="auto")
    assert_travels(fast, tmp_path, [torch.randn(B, N, WIDTH), torch.randn(1, 130, WIDTH)])


@pytest.mark.parametrize("change", [lambda s: s.clamp(min=LEAST), lambda s: torch.maximum(s, torch.tensor(LEAST))])
def test_bounds_that_no_score_is_beyond_are_none(change: Callable[[Tensor], Tensor]) -> None:
    model, x = made(change)
    (site,) = attnopt.inspect(model, (x,)).sites
    assert site.spec.clamp is None


@pytest.mark.parametrize(
    "change",
    [
        lambda s: (s + torch.arange(N) / 8).clamp(-1.0, 1.0),
        lambda s: s.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf).clamp(min=-2.0),
        lambda s: s.clamp(-1.0, 1.0).tanh(),
        lambda s: torch.minimum(s, s.mean()),
        lambda s: torch.clamp(s, s.new_full((N,), -1.0), torch.linspace(0, 1, N)),
    ],
    ids=["after a bias", "after a mask", "before a cap", "by scores", "by keys"],
)
def test_what_else_is_clamped_is_left_alone(change: Callable[[Tensor], Tensor]) -> None:
    model, x = made(change)
    assert not attnopt.inspect(model, (x,)).sites
    fast = attnopt.optimize(model, PruneHeads(heads=[0]), (x,))
    assert_same(run(fast, (x,)), run(model, (x,)), limit=0.0)


@pytest.mark.parametrize("first", [(-3.0, 2.0), (None, -1.0), (1.0, None)])
@pytest.mark.parametrize("second", [(-1.0, 1.5), (None, -2.0), (1.2, None)])
def test_bounds_of_bounds(first: tuple[float | None, float | None], second: tuple[float | None, float | None]) -> None:
    x = torch.linspace(-5, 5, 41)
    for factor in (0.5, -2.0):
        assert torch.equal(x.clamp(*first) * factor, (x * factor).clamp(*scaled(first, factor)))
    assert torch.equal(x.clamp(*first).clamp(*second), x.clamp(*joined(first, second)))
