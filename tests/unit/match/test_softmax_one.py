"""Sinks that are numbers: beside the sum of exponentials, or as a column that scores are padded with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from oracle import Edit, assert_same, run, run_edited
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt
from attnopt.passes import LocalWindow, PruneHeads

pytestmark = [pytest.mark.usefixtures("one_capture"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
B, N, H, D = 2, 6, 3, 4
WIDTH = H * D


def beside(number: float) -> Callable[[Tensor], Tensor]:
    def weights(scores: Tensor) -> Tensor:
        e = scores.exp()
        return e * (e.sum(-1, keepdim=True) + number).reciprocal()

    return weights


def padded(number: float, first: bool = False) -> Callable[[Tensor], Tensor]:
    def weights(scores: Tensor) -> Tensor:
        joined = F.pad(scores, (1, 0) if first else (0, 1), value=number).softmax(-1)
        return joined[..., 1:] if first else joined[..., :-1]

    return weights


def kept_from_overflow(scores: Tensor) -> Tensor:
    top = torch.max(scores, dim=-1, keepdim=True).values.clamp_min(0)
    e = torch.exp2(scores - top)
    return e / (torch.exp2(-top) + e.sum(-1, keepdim=True))


def by_logarithm(number: float) -> Callable[[Tensor], Tensor]:
    def weights(scores: Tensor) -> Tensor:
        return torch.exp(scores - F.pad(scores, (0, 1), value=number).logsumexp(-1, keepdim=True))

    return weights


def by_joined_logarithm(scores: Tensor) -> Tensor:
    joined = torch.cat([torch.zeros_like(scores[..., :1]), scores], -1)
    return (scores - torch.logsumexp(joined, dim=-1).unsqueeze(-1)).exp()


def by_added_logarithms(scores: Tensor) -> Tensor:
    total = scores.logsumexp(-1, keepdim=True)
    return torch.exp(scores - torch.logaddexp(torch.zeros_like(total), total))


class Sunk(nn.Module):
    def __init__(self, weights: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made: Tensor = self.out((self.weights(q @ k.mT / 2) @ v).transpose(1, 2).flatten(2))
        return made


@pytest.mark.parametrize(
    "weights",
    [
        beside(0.5),
        beside(1e-3),
        padded(-0.75),
        padded(0.5, first=True),
        by_logarithm(0.0),
        by_logarithm(-1.5),
        by_joined_logarithm,
        by_added_logarithms,
    ],
    ids=["half", "small", "pad", "first", "log", "log-other", "log-joined", "log-added"],
)
def test_numbers(weights: Callable[[Tensor], Tensor]) -> None:
    model, x = Sunk(weights).eval(), torch.randn(B, N, WIDTH)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    assert [s.spec.has_sinks for s in fast.sites] == [True]
    for other in (x, torch.randn(1, 11, WIDTH)):
        assert_same(run(fast, (other,)), run(model, (other,)))


@pytest.mark.usefixtures("one_torchlib")
def test_windows_and_heads_beside_a_padded_column(tmp_path: Path) -> None:
    model, x = Sunk(padded(0.25)).eval(), torch.randn(B, N, WIDTH)
    seen = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 1
    fast = attnopt.optimize(model, [LocalWindow(1), PruneHeads(heads=[1])], (x,))
    want = run_edited(model, (x,), None, {0: Edit(seen, gains=(1.0, 0.0, 1.0))})
    assert_same(run(fast, (x,)), want)
    fast.save(tmp_path / "saved")
    assert_same(run(attnopt.load(tmp_path / "saved"), (x,)), want)
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same([torch.from_numpy(y)], want)


@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
@pytest.mark.parametrize(
    "taken",
    [
        lambda s: F.pad(s, (0, 2)).logsumexp(-1, keepdim=True),
        lambda s: F.pad(2 * s, (0, 1)).logsumexp(-1, keepdim=True),
        lambda s: F.pad(s, (0, 0, 0, 1)).logsumexp(-1, keepdim=True)[..., :-1, :],
        lambda s: torch.logaddexp(s.logsumexp(-1, keepdim=True), s[..., :1]),
        lambda s: torch.cat([s, s[..., :1]], -1).logsumexp(-1, keepdim=True),
    ],
    ids=["two columns", "of other scores", "another row", "a score again", "a column again"],
)
def test_other_logarithms_are_not_one(taken: Callable[[Tensor], Tensor]) -> None:
    model, x = Sunk(lambda s: torch.exp(s - taken(s))).eval(), torch.randn(B, N, WIDTH)
    found = attnopt.inspect(model, (x,))
    assert not any(s.spec.has_sinks for s in found.sites)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert_same(run(fast, (x,)), run(model, (x,)))


def test_what_belongs_to_other_powers_is_no_one() -> None:
    """exp2 of the scores beside exp of the maximum."""

    def weights(scores: Tensor) -> Tensor:
        top = scores.amax(-1, keepdim=True)
        e = torch.exp2(scores - top)
        return e / (torch.exp(-top) + e.sum(-1, keepdim=True))

    model, x = Sunk(weights).eval(), torch.randn(B, N, WIDTH)
    assert not attnopt.inspect(model, (x,)).sites
    assert [s.spec.has_sinks for s in attnopt.inspect(Sunk(kept_from_overflow).eval(), (x,)).sites] == [True]
