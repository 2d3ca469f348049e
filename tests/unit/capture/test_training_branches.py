"""Branches that serve training alone, such as the pairs of images of DCAL (arXiv:2205.02151): capture leaves them out."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_same, run
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt

B, N, H, D = 2, 5, 2, 4
WIDTH = H * D


class Pairwise(nn.Module):
    """Its own tokens attend to themselves; in training also to those of another image (PWCA)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.pair_out = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        own: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.joined(own, q, k, v)

    def of_pairs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([t, t.roll(1, 0)], 2) for t in (k, v))
        made: Tensor = self.pair_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return made

    def joined(self, own: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class InABranch(Pairwise):
    def joined(self, own: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return own + self.of_pairs(q, k, v) if self.training else own


class Unused(Pairwise):
    """Computed always, and read in training only."""

    def joined(self, own: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = self.of_pairs(q, k, v)
        return own + pairs if self.training else own


class TimesNothing(Pairwise):
    """A weight of the loss that is 0 outside training."""

    def joined(self, own: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return own + self.of_pairs(q, k, v) * float(self.training)


@pytest.mark.parametrize("kind", [InABranch, Unused], ids=lambda kind: kind.__name__)
def test_the_branch_and_its_weights_are_gone(kind: type[Pairwise]) -> None:
    model, x = kind().eval(), torch.randn(B, N, WIDTH)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert [s.kv_len for s in fast.sites] == [N]
    assert not any("pair_out" in name for name in fast.state_dict())
    assert_same(run(fast, (x,)), run(model, (x,)))


def test_what_is_added_times_zero_stays() -> None:
    """It is part of what the model computes: of infinite values, 0 times them is none."""
    model, x = TimesNothing().eval(), torch.randn(B, N, WIDTH)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert [s.kv_len for s in fast.sites] == [N, 2 * N]
    assert_same(run(fast, (x,)), run(model, (x,)))
