"""Masks that are written twice, or with numbers of moderate size, and shifts of whole rows: the same attention, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracle import Edit, assert_same, run, run_edited, visible
from torch import Tensor, nn

import attnopt
from attnopt.passes import LocalWindow
from attnopt.patterns import Window

WIDTH, HEADS, LENGTH = 12, 3, 7
INF, LOW = math.inf, torch.finfo(torch.float32).min

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attending(nn.Module):
    """[B, L, WIDTH], a bool mask [B, L, S] and numbers [B, L, S]; ``weigh`` makes weights of scores [B, H, L, S]."""

    def __init__(self, weigh: Weigh, learned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.weigh = weigh
        self.table = nn.Parameter(torch.randn(LENGTH, LENGTH)) if learned else None

    def forward(self, x: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 2
        if self.table is not None:
            scores = scores + self.table
        made: Tensor = self.o(
            (self.weigh(scores, mask.unsqueeze(1), numbers.unsqueeze(1)) @ v).transpose(1, 2).flatten(2)
        )
        return made


def given(seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose first query of the first sequence sees nothing."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, LENGTH, LENGTH, generator=random) > 0.4
    mask[:, :, 0] = True
    mask[0, 0] = False
    x = torch.randn(batch, LENGTH, WIDTH, generator=random)
    return x, mask, torch.randn(batch, LENGTH, LENGTH, generator=random)


def assigned(s: Tensor, m: Tensor, _: Tensor) -> Tensor:
    s = s.clone()
    s[(~m).expand_as(s)] = -INF
    weights = torch.softmax(s, -1).clone()
    weights[~m.expand_as(s)] = 0
    return weights


def over_their_sum(s: Tensor, m: Tensor, _: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True)) * m.float()
    return torch.nan_to_num(e / e.sum(-1, keepdim=True))


SAME: dict[str, Weigh] = {
    "zeroed where a number was written": lambda s, m, _: s.masked_fill(~m, LOW).softmax(-1).masked_fill(~m, 0.0),
    "zeroed where a moderate number was written": lambda s, m, _: s.masked_fill(~m, -1e4).softmax(-1) * m,
    "zeroed where -inf was written": lambda s, m, _: s.masked_fill(~m, -INF).softmax(-1).masked_fill(m == 0, 0.0),
    "the mask is made anew": lambda s, m, _: s.masked_fill(m.int() == 0, -1e9).softmax(-1) * (m.int() != 0).float(),
    "one of two masks": lambda s, m, n: (
        s.masked_fill(~m, -INF).masked_fill(n > 3, -INF).softmax(-1).masked_fill(~m, 0.0)
    ),
    "rows without a key": lambda s, m, _: torch.where(m.any(-1, keepdim=True), s.masked_fill(~m, LOW).softmax(-1), 0.0),
    "rows of hidden keys": lambda s, m, _: (
        s.masked_fill(~m, LOW).softmax(-1).masked_fill((~m).all(-1).unsqueeze(-1), 0.0)
    ),
    "rows of another mask": lambda s, m, n: s.masked_fill(~m, LOW).softmax(-1) * (n.amax(-1, keepdim=True) < 1).float(),
    "rows of -inf": lambda s, m, _: safe(s.masked_fill(~m, -INF)),
    "no numbers": lambda s, m, _: s.masked_fill(~m, -INF).softmax(-1).nan_to_num(),
    "none where there are none": lambda s, m, _: unless_nan(s.masked_fill(~m, -INF).softmax(-1)),
    "assigned": assigned,
    "masked exponentials": over_their_sum,
    "a moderate number": lambda s, m, _: torch.where(m, s, -65504.0).softmax(-1),
    "a moderate number beside activations": lambda s, m, n: (
        (s + n @ n.transpose(-1, -2) / 9).masked_fill(~m, -1e4).softmax(-1)
    ),
    "moderate numbers of two masks": lambda s, m, n: s.masked_fill(~m, -1e4).masked_fill(n > 3, -1e4).softmax(-1),
    "shifted and zeroed": lambda s, m, _: shifted(s.masked_fill(~m, -1e4)).softmax(-1) * m,
    "shifted by the maximum of all": lambda s, m, _: torch.where(m, s - s.max(), -1e9).softmax(-1),
    "shifted by the maximum of each sequence": lambda s, m, _: torch.where(
        m, s - s.flatten(1).amax(1)[:, None, None, None], -1e9
    ).softmax(-1),
}


def causal(x: Tensor) -> Tensor:
    return x.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -1e4)


def hidden_above(x: Tensor) -> Tensor:
    return x.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), 1e4)


def shifted(s: Tensor) -> Tensor:
    return s - s.amax(-1, keepdim=True)


def safe(s: Tensor) -> Tensor:
    """As torch decomposes its own fused attention."""
    return torch.where((s == -INF).all(-1, keepdim=True), torch.zeros_like(s), s.softmax(-1))


def unless_nan(w: Tensor) -> Tensor:
    return w.masked_fill(torch.isnan(w), 0.0)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("learned", [False, True])
def test_the_same_attention(name: str, learned: bool) -> None:
    """At masks that the example inputs have not, too, and under a window."""
    model = Attending(SAME[name], learned).eval()
    x, _, numbers = given()
    fast = attnopt.optimize(model, "fuse", (x, torch.ones(2, LENGTH, LENGTH, dtype=torch.bool), numbers))
    assert len(fast.sites) == 1
    for seed in (0, 1):
        assert_same(run(fast, given(seed)), run(model, given(seed)), name)
    narrow = attnopt.optimize(model, LocalWindow(2, 1), given())
    assert narrow.report.sites[0].status == "rewritten"
    edit = Edit(visible(Window(2, 1), LENGTH, LENGTH, 1))
    want = run_edited(model, given(1), None, {0: edit}, exponentials=name == "masked exponentials")
    assert_same(run(narrow, given(1)), [w.nan_to_num(0.0) for w in want], name)


CHANGED: dict[str, tuple[str, Weigh]] = {
    "another mask": ("weights-changed", lambda s, m, n: s.masked_fill(~m, -INF).softmax(-1).masked_fill(n > 0, 0.0)),
    "another mask of the same form": (
        "weights-changed",
        lambda s, m, n: s.masked_fill(n > 1, -INF).softmax(-1).masked_fill(n > 0, 0.0),
    ),
    "no mask before": ("weights-changed", lambda s, m, _: s.softmax(-1) * m),
    "the mask turned around": ("weights-changed", lambda s, m, _: s.masked_fill(~m, -INF).softmax(-1) * ~m),
    "the mask transposed": (
        "weights-changed",
        lambda s, m, _: s.masked_fill(~m, -INF).softmax(-1) * m.transpose(-1, -2),
    ),
    "columns without a query": (
        "weights-changed",
        lambda s, m, _: s.masked_fill(~m, -INF).softmax(-1) * m.any(-2, keepdim=True),
    ),
    "one of two masks, the other not for good": (
        "weights-changed",
        lambda s, m, n: s.masked_fill(~m, -1e9).masked_fill(n > 3, -1e9).softmax(-1).masked_fill(~m, 0.0),
    ),
    "beside numbers that may hide too": (
        "weights-changed",
        lambda s, m, n: (s + n).masked_fill(~m, -1e9).softmax(-1).masked_fill(~m, 0.0),
    ),
    "another number for NaN": ("no-value-product", lambda s, m, _: s.masked_fill(~m, -INF).softmax(-1).nan_to_num(1.0)),
    "0 for what overflows": (
        "no-value-product",
        lambda s, m, _: (e := s.exp()).div(e.sum(-1, keepdim=True)).nan_to_num(),
    ),
    "another number than 0": (
        "weights-changed",
        lambda s, m, _: s.masked_fill(~m, -INF).softmax(-1).masked_fill(~m, 0.1),
    ),
    "numbers for a mask": ("weights-changed", lambda s, m, n: s.masked_fill(~m, -INF).softmax(-1) * n),
    "exponentials times numbers": ("weights-changed", lambda s, m, n: (e := s.exp() * n) / e.sum(-1, keepdim=True)),
    "moderate, and numbers after it": ("moderate-mask", lambda s, m, n: (s.masked_fill(~m, -1e4) + n).softmax(-1)),
    "moderate, and numbers that may hide": ("moderate-mask", lambda s, m, n: (s + n).masked_fill(~m, -1e4).softmax(-1)),
    "moderate, and a bias with a mask in it": (
        "moderate-mask",
        lambda s, m, n: (s + (torch.arange(LENGTH) / 9 + n)).masked_fill(~m, -1e4).softmax(-1),
    ),
    "moderate, and a mask of known numbers": (
        "moderate-mask",
        lambda s, m, _: (s + torch.full((LENGTH, LENGTH), -1e4).triu(1)).masked_fill(~m, -1e4).softmax(-1),
    ),
    "moderate, and activations with a mask in them": (
        "moderate-mask",
        lambda s, m, n: (s + causal(n @ n.transpose(-1, -2))).masked_fill(~m, -1e4).softmax(-1),
    ),
    "moderate, and activations with a mask that is subtracted": (
        "moderate-mask",
        lambda s, m, n: (s - hidden_above(n @ n.transpose(-1, -2))).masked_fill(~m, -1e4).softmax(-1),
    ),
    "two moderate numbers": (
        "moderate-mask",
        lambda s, m, n: s.masked_fill(~m, -1e4).masked_fill(n > 3, -2e4).softmax(-1),
    ),
    "shifted by another axis": ("scores-feed-back", lambda s, m, _: (s - s.amax(-2, keepdim=True)).softmax(-1)),
    "shifted before a sink": (
        "scores-feed-back",
        lambda s, m, _: torch.cat([s - s.amax(-1, keepdim=True), torch.ones(*s.shape[:-1], 1)], -1).softmax(-1)[
            ..., :-1
        ],
    ),
    "an epsilon that shows": (
        "scores-feed-back",
        lambda s, m, _: (e := (s - s.amax(-1, keepdim=True)).exp()) / (e.sum(-1, keepdim=True) + 1e-5),
    ),
    "an epsilon beside hidden exponentials": (
        "scores-feed-back",
        lambda s, m, _: (e := (s - s.amax(-1, keepdim=True)).exp() * m) / (e.sum(-1, keepdim=True) + 1e-9),
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_attention(name: str) -> None:
    code, weigh = CHANGED[name]
    found = attnopt.inspect(Attending(weigh).eval(), given())
    assert not found.sites
    assert [miss.refusal.code for miss in found.near_misses] == [code]
