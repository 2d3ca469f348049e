"""The model of tiles against a count of pairs, the published numbers for strided neighbourhoods, and the advice itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_strategies import LEAVES, neighborhoods
from sites import a_site

import attnopt
from attnopt.errors import PolicyError
from attnopt.patterns import Causal, Full, Neighborhood, Pattern, PerHead, Prefix, Sinks, Window
from attnopt.patterns.tile_cost import KERNELS, Tiles


@settings(deadline=None)
@given(LEAVES, st.integers(1, 40), st.integers(1, 40), st.sampled_from([(8, 4, None), (8, 4, 4), (8, 8, 8)]))
def test_shares_are_counted_pairs(p: Pattern, L: int, S: int, sizes: tuple[int, int, int | None]) -> None:
    block_q, block_kv, group = sizes
    rows, cols = -(-L // block_q) * block_q, -(-S // block_kv) * block_kv
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    mask[:L, :S] = p.mask(L, S)[0]
    exists = torch.zeros_like(mask)
    exists[:L, :S] = True
    computed = torch.zeros_like(mask)
    for r in range(0, rows, block_q):
        for c in range(0, cols, block_kv):
            block, inside = (m[r : r + block_q, c : c + block_kv] for m in (mask, exists))
            here = computed[r : r + block_q, c : c + block_kv]
            if group is None or torch.equal(block, inside):
                here[:] = inside & block.any()
                continue
            for g in range(0, block_q, group):
                here[g : g + group] = block[g : g + group].any(0)
    want = min(1.0, computed.sum().item() / (L * S))
    assert Tiles("", block_q, block_kv, group).share(p, L, S, 1) == pytest.approx(want)


@settings(deadline=None)
@given(neighborhoods(), st.integers(1, 3))
def test_grid_shares_are_counted_pairs(p: Neighborhood, tile: int) -> None:
    tokens = torch.cartesian_prod(*(torch.arange(n) for n in p.grid)).reshape(-1, len(p.grid))
    box = tokens // tile
    same = torch.unique(box, dim=0, return_inverse=True)[1]
    length = len(tokens)
    tiles = torch.zeros(int(same.max()) + 1, int(same.max()) + 1)
    tiles.index_put_(
        (same[:, None].expand(-1, length), same.expand(length, -1)), p.mask(length, length)[0].float(), True
    )
    want = (tiles > 0)[same][:, same].float().mean().item()
    assert p.box_share(p.box(tile)) == pytest.approx(want)


@pytest.mark.parametrize(
    ("side", "window", "tile", "speedups"),
    [
        (64, 24, 8, {1: 3.54, 2: 3.54, 4: 3.54, 8: 7.11}),
        (256, 80, 16, {1: 6.30, 16: 10.24}),
    ],
)
def test_published_speedups_of_strided_neighborhoods(
    side: int, window: int, tile: int, speedups: dict[int, float]
) -> None:
    for stride, speedup in speedups.items():
        p = Neighborhood((side, side), window, stride)
        assert 1 / p.box_share(p.box(tile)) == pytest.approx(speedup, abs=0.006)


def test_windows_should_be_odd_multiples_of_the_tile() -> None:
    """With stride = tile = 128 and 4096 tokens: tiles of keys for each tile of queries."""
    visited = {w: 32 * Neighborhood(4096, w, 128).box_share((128,)) for w in (384, 448, 512, 576, 640)}
    assert visited == pytest.approx({384: 3.0, 448: 4.88, 512: 4.88, 576: 5.0, 640: 5.0}, abs=0.006)
    assert 32 * Neighborhood(4096, 384).box_share((128,)) == pytest.approx(4.81, abs=0.006)


def test_advice_on_a_neighborhood() -> None:
    spec = a_site().spec
    advice = attnopt.advise(spec, Neighborhood((64, 64), 24), 4096)
    assert advice.bound == pytest.approx(4096 / 576)
    *_, tiles = advice.kernels
    assert (tiles.kernel, round(tiles.speedup, 2)) == ("tiles of 8x8 tokens", 3.54)
    assert tiles.of_bound == pytest.approx(tiles.speedup / advice.bound)
    best = next(b for b in advice.better if b.kernel == tiles.kernel)
    assert best.pattern.startswith("Neighborhood(grid=(64, 64), kernel=24, stride=8)")
    assert best.speedup == pytest.approx(advice.bound)


def test_advice_on_a_causal_window() -> None:
    site = a_site(pattern=Causal(), q_len=4096, kv_len=4096)
    advice = attnopt.advise(site, "Window(left=200, right=0) | Sinks(4)")
    density = (Causal() & (Window(200, 0) | Sinks(4))).density(4096, 4096)
    assert advice.density == density
    assert advice.bound == pytest.approx(Causal().density(4096, 4096) / density)
    cpu, flex, onnx = advice.kernels
    assert [k.kernel for k in advice.kernels] == [k.name for k in KERNELS]
    assert flex.share == pytest.approx((3 * 32 - 3 + 29) / 32**2), "three tiles a row, and the one with the sinks"
    assert flex.of_bound < onnx.of_bound < cpu.of_bound < 1
    assert [b.pattern for b in advice.better] == ["Window(left=256, right=0) | Sinks(4)"], "more is seen for as much"
    assert advice.better[0].speedup == flex.speedup
    assert advice.better[0].density > advice.density


def test_advice_by_head_and_beside_other_patterns() -> None:
    spec = replace(a_site().spec, pattern=Full())
    advice = attnopt.advise(spec, PerHead({(0, 1): Window(300, 0)}, default=Sinks(8)), 1024)
    assert advice.better[0].pattern == "PerHead({(0, 1): Window(left=384, right=0)}, default=Sinks(8))"
    assert attnopt.advise(spec, Window(128), 1024).better == ()
    assert attnopt.advise(spec, Causal() & Window(1, 0), 1024, 2048).better[0].pattern == (
        "Causal() & Window(left=128, right=0)"
    )
    prefixed = attnopt.advise(spec, Prefix(1, Neighborhood((32, 32), 7)), 1025)
    assert len(prefixed.kernels) == len(KERNELS)
    nothing = attnopt.advise(spec, ~Full(), 64)
    assert nothing.bound == float("inf")


def test_advice_as_text_and_as_data() -> None:
    advice = attnopt.advise(a_site(q_len=4096, kv_len=4096), Neighborhood((64, 64), 24, 4))
    assert json.loads(json.dumps(advice.to_json()))["kernels"][0]["kernel"] == "compiled CPU kernel"
    assert str(advice) == TEXT


TEXT = """\
Neighborhood(grid=(64, 64), kernel=24, stride=4), 4096 queries and 4096 keys: density 0.141, at most 7.11 times faster

 kernel                               computes  speed-up  of the bound
 ─────────────────────────────────────────────────────────────────────
 compiled CPU kernel                  0.155     6.44      91%
 FlexAttention                        0.375     2.67      38%
 ONNX Runtime, loop over 128 queries  0.375     2.67      38%
 tiles of 8x8 tokens                  0.282     3.54      50%

Fits better

 kernel               pattern                                                density  speed-up
 ─────────────────────────────────────────────────────────────────────────────────────────────
 tiles of 8x8 tokens  Neighborhood(grid=(64, 64), kernel=24, stride=8)       0.141    7.11
 tiles of 8x8 tokens  Neighborhood(grid=(64, 64), kernel=24, stride=(4, 8))  0.141    5.02
 tiles of 8x8 tokens  Neighborhood(grid=(64, 64), kernel=24, stride=(8, 4))  0.141    5.02"""


def test_what_it_needs_to_know() -> None:
    with pytest.raises(PolicyError, match="a spec alone has no lengths\n  hint: give q_len"):
        attnopt.advise(a_site().spec, Window(1))
    with pytest.raises(PolicyError, match="is not made for 12 tokens"):
        attnopt.advise(a_site(), Neighborhood((3, 5), 3))
