"""Blocks with a halo at the edges of a sequence: clipped, or moved inside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sites import a_site, refusal
from torch import Tensor, nn
from torch.export import Dim

import attnopt
from attnopt.match.mask_patterns import Sample, name_pattern
from attnopt.passes import SegmentGain, Sparse
from attnopt.patterns import Blocks, Causal, Pattern, PerHead, Prefix, Sinks, parse

SIZES = st.integers(1, 7)
HALOS = st.integers(0, 9)
LENGTHS = st.integers(1, 30)
EDGES = st.sampled_from(["clip", "shift"])


@given(SIZES, HALOS, LENGTHS, st.data())
def test_every_query_sees_a_window_of_the_same_size(size: int, halo: int, length: int, data: st.DataObject) -> None:
    shift = data.draw(st.integers(0, size - 1))
    clipped, moved = (Blocks(size, halo, shift, edge).mask(length, length)[0] for edge in ("clip", "shift"))
    width = min(size + 2 * halo, length)
    assert moved.sum(1).eq(width).all()
    assert (clipped & ~moved).sum() == 0, "no key is lost"
    whole = clipped.sum(1) == size + 2 * halo
    assert torch.equal(clipped[whole], moved[whole]), "away from the edges both are alike"
    starts = moved.int().argmax(1)
    assert torch.equal(moved, (torch.arange(length) - starts[:, None]).remainder(length) < width), "without a gap"
    assert (starts.diff() >= 0).all()


@pytest.mark.parametrize(
    ("pattern", "length", "rows"),
    [
        (Blocks(4, 1, edge="shift"), 10, ["1111110000"] * 4 + ["0001111110"] * 4 + ["0000111111"] * 2),
        (Blocks(2, 3, edge="shift"), 9, ["111111110"] * 4 + ["011111111"] * 5),
        (Blocks(3, edge="shift"), 7, ["1110000"] * 3 + ["0001110"] * 3 + ["0000111"]),
        (Blocks(3, 1, edge="shift"), 4, ["1111"] * 4),
        (Blocks(3, shift=1, edge="shift"), 5, ["11100", "01110", "01110", "01110", "00111"]),
        (Prefix(1, Blocks(2, edge="shift")), 4, ["1111", "1110", "1110", "1011"]),
    ],
)
def test_rows_by_hand(pattern: Pattern, length: int, rows: list[str]) -> None:
    assert ["".join(str(int(x)) for x in row) for row in pattern.mask(length, length)[0]] == rows


@given(SIZES, HALOS, st.integers(1, 40), st.integers(1, 60))
def test_the_layout_has_the_keys_of_the_mask(size: int, halo: int, q_len: int, kv_len: int) -> None:
    moved = Blocks(size, halo, size // 2, "shift")
    found, seen = moved.layout(q_len, kv_len, 4, 4), torch.zeros(44, 64, dtype=torch.bool)
    for row, col, tile in zip(found.rows, found.cols, found.tile, strict=True):
        pairs = True if tile < 0 else torch.from_numpy(found.tiles[tile].copy())
        seen[row * 4 : row * 4 + 4, col * 4 : col * 4 + 4] = pairs
    assert torch.equal(seen[:q_len, :kv_len], moved.mask(q_len, kv_len)[0])
    assert moved.density(q_len, kv_len) == pytest.approx(moved.mask(q_len, kv_len).float().mean().item())


def test_fewer_queries_are_the_last_ones() -> None:
    moved = PerHead({1: Causal() & ~Blocks(4, 2, edge="shift"), 2: Sinks(1) | Blocks(3, 4, edge="shift")})
    assert torch.equal(moved.mask(3, 11), moved.mask(11, 11)[:, -3:])


def test_only_an_unusual_edge_is_printed() -> None:
    assert str(Blocks(4, 2)) == "Blocks(size=4, halo=2)"
    assert str(Blocks(4, 2, 1, "shift")) == "Blocks(size=4, halo=2, shift=1, edge='shift')"
    assert parse("Blocks(4, halo=2, edge='shift')") == Blocks(4, 2, edge="shift") != Blocks(4, 2)


def test_a_mask_without_a_length_is_an_error() -> None:
    @dataclass(frozen=True, repr=False)
    class Wrapped(Pattern):
        """Of a third party, which does not hand the length on."""

        inner: Pattern

        def visible(self, i: Tensor, j: Tensor) -> Tensor:
            return self.inner.visible(i, j)

    with pytest.raises(TypeError, match="depends on the length of the sequence"):
        Wrapped(Blocks(3, 1, edge="shift")).mask(9, 9)
    assert torch.equal(Wrapped(Blocks(3, 1)).mask(9, 9), Blocks(3, 1).mask(9, 9))


def test_a_text_that_is_continued_changes_what_was_seen() -> None:
    site = replace(a_site(q_len=3), alignment="last")
    assert Sparse(Causal() & Blocks(4, 1)).check(site) is None
    for pattern in (Blocks(4, 1, edge="shift"), PerHead({1: Prefix(1, Causal() & ~Blocks(4, edge="shift"))})):
        assert "[needs-self-attention]" in refusal(Sparse(pattern), site)
        assert "found 3 queries after 9 past keys" in refusal(SegmentGain(pattern, 0.5), site)


# ---------------------------------------------------------------- masks that are blocks
@given(SIZES, HALOS, st.integers(0, 6), EDGES, st.booleans(), LENGTHS)
def test_blocks_are_named_from_their_mask(
    size: int, halo: int, shift: int, edge: str, causal: bool, length: int
) -> None:
    pattern: Pattern = Blocks(size, halo, shift % size, edge)
    if causal and edge == "clip":
        pattern = pattern & Causal()
    mask = pattern.mask(length, length)
    found = name_pattern([(Sample(length, length, torch.arange(length), torch.arange(length), True, (mask,)), mask)])
    assert found is not None
    assert torch.equal(found.mask(length, length), mask)


@given(st.data(), st.integers(2, 12))
def test_no_other_mask_is_named(data: st.DataObject, length: int) -> None:
    rows = data.draw(
        st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, 4)), min_size=length, max_size=length)
    )
    mask = torch.tensor([[start <= j < start + n for j in range(length)] for start, n in rows])[None]
    mask[0, 0, data.draw(st.integers(0, length - 1))] ^= True
    found = name_pattern([(Sample(length, length, torch.arange(length), torch.arange(length), True, (mask,)), mask)])
    assert found is None or torch.equal(found.mask(length, length), mask)


class Masked(nn.Module):
    def __init__(self, pattern: Pattern | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.pattern = nn.Linear(12, 36), nn.Linear(12, 12), pattern

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT * 0.5
        if self.pattern is not None:
            scores = scores.masked_fill(~self.pattern.mask(x.shape[1], x.shape[1]), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "pattern",
    [Blocks(4, 1, edge="shift"), Blocks(4, 2), Blocks(5, 6, 2, "shift"), Causal() & Blocks(4, shift=3), Blocks(3)],
    ids=str,
)
def test_the_mask_of_a_model_is_named(pattern: Pattern) -> None:
    model, x = Masked(pattern), torch.randn(2, 21, 12)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert fast.sites[0].spec.pattern == pattern
    assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "blocked"])
@pytest.mark.parametrize("pattern", [Blocks(4, 3, edge="shift"), Sinks(1) | Blocks(70, 5, 3, "shift")], ids=str)
def test_sparse_at_other_lengths(pattern: Pattern, backend: str) -> None:
    model, x = Masked(None), torch.randn(2, 21, 12)
    fast = attnopt.optimize(model, Sparse(pattern), (x,), dynamic_shapes={"x": {1: Dim.DYNAMIC}}, backend=backend)
    want = Masked(pattern)
    for length in (21, 2, 9, 10, 11, 150):
        other = torch.randn(2, length, 12)
        assert torch.allclose(fast(other), want(other), atol=1e-5), length
