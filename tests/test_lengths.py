"""Right at every length: windows beyond the example, lengths that only happen to be equal, and axes that are no heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, run
from torch import Tensor, nn
from torch.export import Dim

import attnopt
from attnopt.patterns import Causal, Full, Pattern, Window

WIDTH, HEADS = 24, 3
Mask = Callable[[int], Tensor]


class Masked(nn.Module):
    """Self-attention under ``mask(length)``, a bool or float [L, L]."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.mask = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x.shape[1]))
        return self.out(made.transpose(1, 2).flatten(2))


def ij(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None, :]


def window(n: int, left: int = 24) -> Tensor:
    i, j = ij(n)
    return (i - j < left) & (j <= i)


def scaled(n: int) -> Tensor:
    i, j = ij(n)
    return (i * 3 - j * 3 < 90) & (j <= i)


def shifted(n: int) -> Tensor:
    i, j = ij(n)
    return ((i - 10) - (j + 20) < 7) & (j <= i)


def two_sided(n: int) -> Tensor:
    i, j = ij(n)
    return (i - j).abs() <= 31


def chunks(n: int) -> Tensor:
    i, j = ij(n)
    return (i // 40 == j // 40) & (j <= i)


def window_of_blocks(n: int) -> Tensor:
    i, j = ij(n)
    return (i // 8 - j // 8 < 6) & (j <= i)


def counted(n: int) -> Tensor:
    place = torch.ones(n).cumsum(0) - 1
    return (place[:, None] - place[None] < 24) & (place[None] <= place[:, None])


def stored(table: Tensor) -> Mask:
    return lambda n: table[:n, :n]


def with_sinks(n: int) -> Tensor:
    i, j = ij(n)
    return window(n) | ((j < 2) & (j <= i))


def beyond(n: int) -> Tensor:
    i, j = ij(n)
    return (i - j < 200_000) & (j <= i)


def endless(n: int) -> Tensor:
    i, j = ij(n)
    return (i - j < 1 << 30) & (j <= i)


CASES: dict[str, tuple[Mask, Pattern, int]] = {
    "window": (window, Window(23, 0), 75),
    "scaled": (scaled, Window(29, 0), 95),
    "shifted": (shifted, Window(36, 0), 113),
    "two-sided": (two_sided, Window(31, 31), 97),
    "triangles": (lambda n: torch.ones(n, n, dtype=torch.bool).tril().triu(-29), Window(29, 0), 95),
    "added": (
        lambda n: torch.full((n, n), -torch.inf).triu(1) + torch.full((n, n), -torch.inf).tril(-30),
        Window(29, 0),
        95,
    ),
    "counted": (counted, Window(23, 0), 75),
    "chunks": (chunks, Full(), 125),
    "window of blocks": (window_of_blocks, Full(), 147),
    "sinks": (with_sinks, Full(), 75),
    "stored": (stored(window(90)), Window(23, 0), 89),
    "beyond": (beyond, Full(), 75),
    "endless": (endless, Causal(), 75),
    "causal": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(), Causal(), 75),
    "all but far": (lambda n: ij(n)[0] - ij(n)[1] < 50, Full(), 155),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mask_longer_than_the_example(name: str) -> None:
    mask, pattern, far = CASES[name]
    model = Masked(mask).eval()
    x = torch.randn(2, 9, WIDTH)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes={"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}})
    (site,) = fast.sites
    assert site.spec.pattern == pattern
    assert any("own mask is kept" in note for note in site.notes) == (pattern == Full())
    for length in (9, 30, far):
        other = torch.randn(3, length, WIDTH)
        assert_same(run(fast, (other,)), run(model, (other,)))


class Pair(nn.Module):
    """Queries from one input, keys and values from another."""

    def __init__(self, mask: Callable[[int, int], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mask = mask

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(y).chunk(2, -1)))
        mask = None if self.mask is None else self.mask(x.shape[1], y.shape[1])
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(made.transpose(1, 2).flatten(2))


def at_the_end(q_len: int, kv_len: int) -> Tensor:
    return torch.arange(kv_len)[None] <= torch.arange(q_len)[:, None] + (kv_len - q_len)


ACROSS: dict[str, Callable[[int, int], Tensor] | None] = {
    "is_causal": None,
    "tril": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(),
    "arange": lambda q, k: torch.arange(k)[None] <= torch.arange(q)[:, None],
    "triu": lambda q, k: torch.full((q, k), -torch.inf).triu(1),
    "end": at_the_end,
    "tril at the end": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q),
}


@pytest.mark.parametrize("name", ACROSS)
def test_two_lengths_that_are_equal_in_the_example(name: str) -> None:
    model = Pair(ACROSS[name]).eval()
    x, y = torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH)
    axes = {0: Dim("batch"), 1: Dim.DYNAMIC}
    fast = attnopt.optimize(model, "fuse", (x, y), dynamic_shapes={"x": axes, "y": axes})
    (site,) = fast.sites
    assert not site.spec.is_causal
    for q_len, kv_len in ((6, 6), (3, 9), (9, 3), (17, 31)):
        x, y = torch.randn(5, q_len, WIDTH), torch.randn(5, kv_len, WIDTH)
        assert_same(run(fast, (x, y)), run(model, (x, y)))


class Windows(nn.Module):
    """[B, heads, windows, tokens, D]: attention inside windows, with as many heads as are asked for."""

    def __init__(self, heads: int, size: int, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.heads, self.size = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), heads, size
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (
            t.unflatten(1, (-1, self.size)).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)
            for t in (self.norm(q), k, v)
        )
        weights = (q @ k.transpose(-1, -2) * 0.4).softmax(-1)
        return self.out((weights @ v).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_windows_are_no_heads(heads: int, norm: bool) -> None:
    model = Windows(heads, 4, norm).eval()
    x = torch.randn(3, 8, WIDTH)
    (site,) = attnopt.inspect(model, (x,)).sites
    assert site.num_heads == heads
    assert len(set(site.projections["k"].rows or ())) == heads
    fast = attnopt.optimize(model, "local-window(left=1)", (x,))
    assert [s.status for s in fast.report.sites] == ["rewritten"]
