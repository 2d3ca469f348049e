"""Depthwise convolutions on queries, keys and values (RCMHA, Primer's MDHA): kept between the projections and the attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracle import assert_same, run
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt.passes import LocalWindow, PruneHeads, ScaleHeads

pytestmark = [pytest.mark.usefixtures("one_capture"), pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")]
B, N, H, D, WIDTH, KERNEL = 2, 7, 3, 4, 12, 3


class Convolved(nn.Module):
    """[B, N, WIDTH]; each channel of queries, keys and values sees its own last tokens."""

    channels, padding, causal = WIDTH, KERNEL - 1, True

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        n = self.channels
        self.filters = nn.ModuleList(nn.Conv1d(n, n, KERNEL, padding=self.padding, groups=n) for _ in range(3))

    def filtered(self, x: Tensor, convolve: nn.Module) -> Tensor:
        """[B, H, N, D]"""
        y = convolve(x.transpose(1, 2))[..., : x.shape[1]]
        return y.unflatten(1, (H, D)).transpose(2, 3)

    def forward(self, x: Tensor, visible: Tensor | None = None, gains: Tensor | None = None) -> Tensor:
        q, k, v = (self.filtered(f(x), c) for f, c in zip((self.q, self.k, self.v), self.filters, strict=True))
        scores = q @ k.mT / D**0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -torch.inf)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        o = scores.softmax(-1) @ v
        made: Tensor = self.out((o if gains is None else o * gains).transpose(1, 2).flatten(2))
        return made


class Padded(Convolved):
    """Zeros are put in front of the tokens."""

    padding = 0

    def filtered(self, x: Tensor, convolve: nn.Module) -> Tensor:
        return convolve(F.pad(x.mT, (KERNEL - 1, 0))).unflatten(1, (H, D)).mT


class Centred(Convolved):
    """Each token sees both neighbours, and every other one in the attention."""

    padding, causal = 1, False


class Shared(Convolved):
    """One filter for all heads, which are in the batch meanwhile."""

    channels = D

    def filtered(self, x: Tensor, convolve: nn.Module) -> Tensor:
        n = x.shape[1]
        y = x.unflatten(2, (H, D)).permute(0, 2, 3, 1).reshape(-1, D, n)
        return convolve(y)[..., :n].view(-1, H, D, n).permute(0, 1, 3, 2)


KINDS = (Convolved, Padded, Centred, Shared)
each = pytest.mark.parametrize("kind", mostly_slow(KINDS, Convolved), ids=lambda kind: kind.__name__)


def made(kind: type[Convolved]) -> tuple[Convolved, Tensor]:
    torch.manual_seed(0)
    return zoo.loud(kind()), torch.randn(B, N, WIDTH)


@each
def test_read_with_its_filters(kind: type[Convolved]) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    (site,) = fast.sites
    assert not site.is_cross
    assert str(site.spec.pattern) == ("Causal()" if kind.causal else "Full()")
    for other in (x, torch.randn(3, 1, WIDTH), torch.randn(1, 130, WIDTH)):
        assert_same(run(fast, (other,)), run(model, (other,)))


@each
def test_windows_and_heads(kind: type[Convolved]) -> None:
    model, x = made(kind)
    ahead = (torch.arange(N) - torch.arange(N)[:, None]).abs()
    windowed = attnopt.optimize(model, LocalWindow(1), (x,))
    assert windowed.report.sites[0].status == "rewritten"
    assert_same(run(windowed, (x,)), [model(x, visible=ahead <= 1)])
    if kind is Shared:  # heads are in the batch there, and none of them can be told
        return
    for policy, gains in ((PruneHeads(heads=[1]), (1.0, 0.0, 1.0)), (ScaleHeads({0: 2.0}), (2.0, 1.0, 1.0))):
        fast = attnopt.optimize(model, policy, (x,))
        assert_same(run(fast, (x,)), [model(x, gains=torch.tensor(gains)[:, None, None])])


def test_filters_of_two_sequences_are_two() -> None:
    class Across(Convolved):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = (
                self.filtered(f(t), c)
                for f, c, t in zip((self.q, self.k, self.v), self.filters, (x, y, y), strict=True)
            )
            made: Tensor = self.out(((q @ k.mT / D**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
            return made

    model, x = made(Across)
    (site,) = attnopt.inspect(model, (x, torch.randn(B, N, WIDTH))).sites
    assert site.is_cross
