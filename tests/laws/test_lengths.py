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
from attnopt.patterns import Blocks, Causal, Full, Pattern, Window

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


@pytest.mark.parametrize("step", [1, 2])
def test_no_scores_are_left_to_tell_a_length(step: int) -> None:
    """Queries, keys and values are three inputs of one free length, or a part of it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[:, ::step].unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)

    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    example, longer = ([torch.randn(1, n, WIDTH) for _ in range(3)] for n in (7, 40))
    shapes = {name: {1: Dim("n", min=3)} for name in "qkv"}
    for backend in ("blocked", "sdpa"):
        fast = attnopt.optimize(Core(), "fuse", tuple(example), dynamic_shapes=shapes, backend=backend)
        targets = [str(n.target) for n in fast.graph_module.graph.nodes]
        assert not [t for t in targets if "matmul" in t or "bmm" in t or "softmax" in t]
        assert_same(run(fast, tuple(longer)), [attend(*longer)])


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
    "moved inside": (lambda n: Blocks(8, 20, edge="shift").mask(n, n)[0], Full(), 125),
    "window of blocks": (window_of_blocks, Full(), 147),
    "sinks": (with_sinks, Full(), 75),
    "stored": (stored(window(90)), Window(23, 0), 89),
    "beyond": (beyond, Full(), 75),
    "endless": (endless, Causal(), 75),
    "causal": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(), Causal(), 75),
    "all but far": (lambda n: ij(n)[0] - ij(n)[1] < 50, Full(), 155),
}


def before(n: int) -> Tensor:
    i, j = ij(n)
    return i - j


def near_and(seen: Callable[[Tensor], Tensor]) -> Mask:
    """Causal, where ``seen`` shows a distance; each query sees itself."""
    return lambda n: ((before(n) >= 0) & seen(before(n).clamp(min=0))) | (before(n) == 0)


def above(n: int, seen: Callable[[int], Tensor]) -> Tensor:
    return (before(n) >= 0) & (seen(n) | (before(n) == 0))


THRESHOLDS = torch.tensor([60.5, 80.5, 70.5])
HOLES = window(1100, 2000).index_put((torch.tensor([1090]), torch.tensor([533])), torch.tensor(False))
FAR_OFF: dict[str, tuple[Mask, Pattern]] = {
    "a logarithm": (near_and(lambda d: d.clamp(min=1).float().log2() < 6), Full()),
    "a root": (near_and(lambda d: d.float().sqrt() < 8), Full()),
    "an exponential": (near_and(lambda d: torch.exp(d * -0.02) > 0.3), Full()),
    "a cosine": (near_and(lambda d: torch.cos(d * 0.02) > 0.3), Full()),
    "bits": (near_and(lambda d: (d & 64) == 0), Full()),
    "shifted bits": (near_and(lambda d: (d >> 3) < 8), Full()),
    "a power of constants": (near_and(lambda d: d < torch.tensor(2.0) ** torch.tensor(6.0)), Window(63, 0)),
    "a sum of constants": (near_and(lambda d: d < THRESHOLDS.sum() / 3), Window(70, 0)),
    "thresholds by head": (lambda n: (before(n) >= 0) & (before(n) < THRESHOLDS[:, None, None]), Full()),
    "a fraction": (near_and(lambda d: d * 0.01 < 0.6), Window(60, 0)),
    "a large factor": (near_and(lambda d: d * 1_000_000 < 64_000_000), Full()),
    "a small divisor": (near_and(lambda d: d.float() / 1e-10 < 64e10), Full()),
    "steps of a bias": (lambda n: (before(n).abs() * 0.02).floor() * -1e9, Window(49, 49)),
    "a ramp": (lambda n: torch.relu(before(n).abs() * 0.02 - 1) * -1e9, Window(50, 50)),
    "a period of a window": (near_and(lambda d: (d < 70) | (d % 70 == 0)), Full()),
    "wide blocks": (lambda n: (ij(n)[0] // 16 - ij(n)[1] // 16).abs() <= 5, Full()),
    "steps up to half a million": (near_and(lambda d: d // 1000 < 500), Full()),
    "fractions of blocks": (lambda n: (ij(n)[0] * (1 / 64)).floor() == (ij(n)[1] * (1 / 64)).floor(), Full()),
    "few bits": (lambda n: before(n).to(torch.int8) >= 0, Full()),
    "half precision": (lambda n: ij(n)[1].bfloat16() <= ij(n)[0].bfloat16(), Full()),
    "sums on the way": (lambda n: (lambda c: (c[:, None] - c).abs() < 7)((torch.ones(n) * 0.1).cumsum(0)), Full()),
    "from a length on": (lambda n: above(n, lambda n: (torch.tensor(n) < 60) | (before(n) < 50)), Full()),
    "up to a length": (lambda n: above(n, lambda n: (torch.tensor(n) > 6) | (before(n) < 2)), Full()),
    "at one length": (lambda n: above(n, lambda n: (ij(n)[1] * 0 + n) * 3 != 231), Full()),
    "a root of the length": (lambda n: above(n, lambda n: before(n) < 20 + torch.tensor(n).float().sqrt()), Full()),
    "times the length": (lambda n: above(n, lambda n: before(n) ** 2 * n < 27_000_000), Full()),
    "a hole in a table": (stored(HOLES), Full()),
}


@pytest.mark.parametrize("name", FAR_OFF)
def test_a_mask_that_changes_far_from_its_numbers(name: str) -> None:
    mask, pattern = FAR_OFF[name]
    model = Masked(lambda n: made if (made := mask(n)).dtype == torch.bool else made.float()).eval()
    fast = attnopt.optimize(
        model, "fuse", (torch.randn(2, 9, WIDTH),), dynamic_shapes={"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    )
    assert [s.spec.pattern for s in fast.sites] == [pattern]
    for length in (2, 5, 9, 30, 59, 77, 170, 400, *((1099,) if "hole" in name else ())):
        other = torch.randn(1, length, WIDTH)
        assert_same(run(fast, (other,)), run(model, (other,)))


class ByBatch(Masked):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = (torch.arange(x.shape[0]) >= 40)[:, None, None, None] | (before(x.shape[1]) >= 0)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def test_a_mask_that_changes_far_off_in_the_batch() -> None:
    model = ByBatch(window).eval()
    fast = attnopt.optimize(
        model, "fuse", (torch.randn(2, 9, WIDTH),), dynamic_shapes={"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    )
    assert [s.spec.pattern for s in fast.sites] == [Full()]
    other = torch.randn(50, 7, WIDTH)
    assert_same(run(fast, (other,)), run(model, (other,)))


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

    def __init__(self, heads: int, size: int, norm: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.heads, self.size = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), heads, size
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) if role in norm else nn.Identity() for role in "qkv")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (
            t.unflatten(1, (-1, self.size)).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)
            for t in (norm(t) for norm, t in zip(self.norms, (q, k, v), strict=True))
        )
        weights = (q @ k.transpose(-1, -2) * 0.4).softmax(-1)
        return self.out((weights @ v).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))


@pytest.mark.parametrize("norm", ["", "q", "qkv"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_windows_are_no_heads(heads: int, norm: str) -> None:
    model = Windows(heads, 4, norm).eval()
    x = torch.randn(3, 8, WIDTH)
    (site,) = attnopt.inspect(model, (x,)).sites
    assert site.num_heads == heads
    assert norm == "qkv" or len(set(site.projections["k"].rows or ())) == heads
    fast = attnopt.optimize(model, "local-window(left=1)", (x,))
    assert [s.status for s in fast.report.sites] == ["rewritten"]


@pytest.mark.parametrize("heads", [2, 4])
def test_a_length_that_is_a_multiple(heads: int) -> None:
    model = Windows(heads, 4, norm="").eval()
    shapes = {"x": {0: Dim.DYNAMIC, 1: 4 * Dim("windows", min=1, max=99)}}
    fast = attnopt.optimize(model, "fuse", (torch.randn(3, 8, WIDTH),), dynamic_shapes=shapes)
    assert [s.num_heads for s in fast.sites] == [heads]
    for batch, length in ((3, 8), (2, 20), (5, 36)):
        other = torch.randn(batch, length, WIDTH)
        assert_same(run(fast, (other,)), run(model, (other,)))
