"""Queries that see no key: what causal masks and padding on the left leave them, and what is said where that changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import assert_same, run
from torch import Tensor, nn

import attnopt

WIDTH, HEADS, LENGTH, PADDED = 12, 3, 7, 3
LOW = torch.finfo(torch.float32).min


class Decoder(nn.Module):
    """A causal mask and a padding mask, each written over the scores or added to them, one after the other."""

    def __init__(self, causal: tuple[str, float], padding: tuple[str, float], padding_last: bool, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv.weight.data[: 2 * WIDTH] *= size
        self.causal, self.padding, self.padding_last = causal, padding, padding_last

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / 2
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        masks = [(ahead, *self.causal), (tokens[:, None, None] == 0, *self.padding)]
        for hidden, how, number in masks if self.padding_last else masks[::-1]:
            if how == "written":
                scores = scores.masked_fill(hidden, number)
            else:
                scores = scores + torch.zeros(hidden.shape).masked_fill(hidden, number)
        made: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made


def padded_left() -> tuple[Tensor, Tensor]:
    """A whole sequence, one that is padded on the left, and one that is padding alone."""
    x = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    tokens = torch.ones(3, LENGTH)
    tokens[1, :PADDED] = tokens[2] = 0
    return x, tokens


FORMS = list(itertools.product(("written", "added"), (-math.inf, LOW, -1e9, -1e4)))


@pytest.mark.parametrize("padding_last", [False, True])
@pytest.mark.parametrize("padding", FORMS)
@pytest.mark.parametrize("causal", FORMS)
def test_padding_on_the_left(causal: tuple[str, float], padding: tuple[str, float], padding_last: bool) -> None:
    """Every token gets the model's numbers; what stands before them does, too, or the site says that it does not."""
    x, tokens = padded_left()
    differs = False
    for size in (1.0, 16.0):  # scores of hundreds show beside -1e9
        model = Decoder(causal, padding, padding_last, size).eval()
        found = attnopt.inspect(model, (x, torch.ones_like(tokens)))
        if not found.sites:
            assert [m.refusal.code for m in found.near_misses] == ["moderate-mask"]
            return
        fast = attnopt.optimize(model, "fuse", (x, torch.ones_like(tokens)))
        (got,), (want,) = run(fast, (x, tokens)), run(model, (x, tokens))
        assert_same([got[0], got[1, PADDED:]], [want[0], want[1, PADDED:]])
        before, meant = (torch.cat([made[1, :PADDED], made[2]]) for made in (got, want))
        differs = differs or not torch.allclose(before[~meant.isnan()], meant[~meant.isnan()], atol=1e-4)
    (site,) = fast.sites
    is_told = any("every key is hidden" in note for note in site.notes)
    # what is added is made from an input, and might hide as far as what is written
    is_cautious = (causal, padding) == (("written", -1e9), ("added", -1e4))
    assert is_told == (differs or is_cautious)


def test_an_example_with_padding_on_the_left() -> None:
    """Where the example itself shows the difference, the attention is left alone, and the hint says what to do."""
    model = Decoder(("written", -1e4), ("added", -1e4), padding_last=True, size=1.0).eval()
    found = attnopt.inspect(model, padded_left())
    assert not found.sites
    assert [m.refusal.code for m in found.near_misses] == ["not-equal"]
    assert "pad on the right" in found.near_misses[0].refusal.hint
    with pytest.warns(attnopt.AttnoptWarning, match="no attention"):
        fast = attnopt.optimize(model, "fuse", padded_left())
    assert_same(run(fast, padded_left()), run(model, padded_left()))
