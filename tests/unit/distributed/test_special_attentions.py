"""Attentions that are no plain softmax over keys, shared by ranks: exact or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parallel_specials import CHECKS, SPECIALS, WIDTH, D, H, Plain, optimized
from ranks import on_ranks
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt.distributed import plan
from attnopt.errors import DistributedError

REFUSED = tuple(name for name in SPECIALS if name not in CHECKS)
QUICK_REFUSED = ("fading, between", "talking, alone")


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("ranks", [2, 4])
def test_everything_that_is_not_refused_is_exact(ranks: int) -> None:
    assert not on_ranks(ranks, checks="parallel_specials")


@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
@pytest.mark.parametrize("name", mostly_slow(REFUSED, *QUICK_REFUSED))
def test_what_is_not_exact_is_refused(name: str) -> None:
    with pytest.raises(DistributedError, match=SPECIALS[name].refused):
        plan(optimized(name), 2)


class Crossing(nn.Module):
    """The features of an attention's heads attend to each other: as many as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = Plain(), nn.Linear(H * D, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.first.q, self.first.k, self.first.v))
        o = F.scaled_dot_product_attention(q, k, v).mT
        made: Tensor = self.out(F.scaled_dot_product_attention(o, o, o).mT.transpose(1, 2).flatten(2))
        return made


def test_features_of_one_attention_are_not_the_tokens_of_another() -> None:
    fast = attnopt.optimize(Crossing(), "fuse", (torch.randn(2, D, WIDTH),), backend="blocked")
    with pytest.raises(DistributedError, match="reads other tokens than those that ranks share"):
        plan(fast, 2)
