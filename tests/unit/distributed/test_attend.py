"""One attention in the rounds of a rank, without other ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.backends.attention_operator import ATTENTION_WITH_LSE
from attnopt.distributed.attend import Attend
from attnopt.distributed.key_rounds import Attention
from attnopt.distributed.ranks import Ranks
from attnopt.distributed.rounds import Rounds
from attnopt.distributed.shards import Shards
from attnopt.patterns import Causal

GROUP: Any = None  # nothing is sent


@pytest.mark.parametrize("with_sinks", [False, True])
def test_merged_log_sum_exps_have_their_gradients(with_sinks: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(1, 4, 1, 1, dtype=torch.float64, requires_grad=True) if with_sinks else None
    operands = [x for x in (q, k, v, sinks) if x is not None]
    rounds = Rounds.plan(Causal(), 4, Shards.of(7, 1))
    part = Attend(Attention("site", Causal(), (0, 0, 1, 1), 0.5, None, rounds, Ranks(GROUP, 0, 1), with_lse=True))

    def gradients(made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        o, top, log_sum = made
        loss = o.square().sum() + ((top.detach() + log_sum) * torch.arange(7)).square().sum()
        return torch.autograd.grad(loss, operands)

    got = part(q, k, v, None, None, sinks)
    want = ATTENTION_WITH_LSE(q, k, v, None, None, sinks, "Causal()", [0, 0, 1, 1], 0.5, None)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1] + got[2], want[1] + want[2])
    for mine, theirs in zip(gradients(got), gradients(want), strict=True):
        torch.testing.assert_close(mine, theirs)
