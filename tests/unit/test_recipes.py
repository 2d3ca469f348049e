"""Every recipe against the paper's definition, pair by pair, in plain Python."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnopt
from attnopt import recipes
from attnopt.errors import PolicyError
from attnopt.patterns import Pattern, RandomBlocks, parse

Sees = Callable[[int, int, int], bool]  # head, query, key


def on_grid(grid: tuple[int, ...], sees: Callable[[tuple[int, ...], tuple[int, ...]], bool]) -> Sees:
    places = list(itertools.product(*(range(n) for n in grid)))
    return lambda h, i, j: sees(places[i], places[j])


def shifted_group(i: int, group: int, h: int, heads: int) -> int:
    return i // group if h < heads // 2 else (i + group // 2) // group


def in_longnet(h: int, i: int, j: int) -> bool:
    def kept(t: int, w: int, r: int) -> bool:
        return t in range(t // w * w + h % r, t // w * w + w, r)

    return j <= i and any(i // w == j // w and kept(i, w, r) and kept(j, w, r) for w, r in ((4, 1), (8, 2), (16, 4)))


def swin_region(c: int, n: int, window: int, shift: int) -> tuple[int, int]:
    """The window after the roll by ``shift``, and on which side of the border the token was."""
    rolled = (c - shift) % n
    return rolled // window, int(c < shift)


def nearest(i: int, j: int, n: int, kernel: int) -> bool:
    """Whether j is one of the ``kernel`` tokens, i in their middle where the border allows it."""
    start = min(max(i - kernel // 2, 0), n - kernel)
    return start <= j < start + kernel


def dilated_nearest(i: int, j: int, n: int, kernel: int, dilation: int) -> bool:
    alike = list(range(i % dilation, n, dilation))
    return j in alike and nearest(alike.index(i), alike.index(j), len(alike), kernel)


CASES: dict[str, tuple[Pattern, int, int, Sees]] = {  # pattern, heads, length, definition
    "longformer": (
        recipes.longformer(6, [0, 9]),
        1,
        20,
        lambda h, i, j: abs(i - j) <= 3 or i in (0, 9) or j in (0, 9),
    ),
    "longformer dilated": (
        recipes.longformer(4, dilation=3),
        1,
        20,
        lambda h, i, j: (i - j) % 3 == 0 and abs(i - j) <= 6,
    ),
    "bigbird": (
        recipes.bigbird(4, window=3, random=0, global_blocks=2),
        1,
        31,
        lambda h, i, j: abs(i // 4 - j // 4) <= 1 or i // 4 < 2 or j // 4 < 2,
    ),
    "bigbird without global blocks": (
        recipes.bigbird(3, window=1, random=2, global_blocks=0, blocks=7),
        1,
        21,
        lambda h, i, j: i // 3 == j // 3 or bool(RandomBlocks(3, 2, 7).mask(21, 21)[0, i, j]),
    ),
    "sparse_transformer_strided": (
        recipes.sparse_transformer_strided(4),
        1,
        20,
        lambda h, i, j: max(0, i - 4) <= j <= i or (j <= i and (i - j) % 4 == 0),
    ),
    "sparse_transformer_fixed": (
        recipes.sparse_transformer_fixed(5, 2),
        1,
        23,
        lambda h, i, j: j <= i and (j // 5 == i // 5 or j % 5 in (3, 4)),
    ),
    "streaming_llm": (recipes.streaming_llm(5, 2), 1, 20, lambda h, i, j: i - 4 <= j <= i or (j < 2 and j <= i)),
    "s2_attn": (
        recipes.s2_attn(6, heads=4),
        4,
        25,
        lambda h, i, j: j <= i and shifted_group(i, 6, h, 4) == shifted_group(j, 6, h, 4),
    ),
    "s2_attn of SinkLoRA": (
        recipes.s2_attn(6, heads=3, causal=False, sinks=2),
        3,
        25,
        lambda h, i, j: shifted_group(i, 6, h, 3) == shifted_group(j, 6, h, 3) or j < 2,
    ),
    "longnet": (recipes.longnet([4, 8, 16], [1, 2, 4], heads=5), 5, 37, in_longnet),
    "swin": (
        recipes.swin((6, 9), 3),
        1,
        54,
        on_grid((6, 9), lambda a, b: all(x // 3 == y // 3 for x, y in zip(a, b, strict=True))),
    ),
    "swin shifted": (
        recipes.swin((6, 8), (3, 4), shift=(1, 2)),
        1,
        48,
        on_grid(
            (6, 8),
            lambda a, b: all(
                swin_region(x, n, w, s) == swin_region(y, n, w, s)
                for x, y, n, w, s in zip(a, b, (6, 8), (3, 4), (1, 2), strict=True)
            ),
        ),
    ),
    "halonet": (
        recipes.halonet((6, 7), 3, 1),
        1,
        42,
        on_grid((6, 7), lambda a, b: all(x // 3 * 3 - 1 <= y <= x // 3 * 3 + 3 for x, y in zip(a, b, strict=True))),
    ),
    "halonet moved inside": (
        recipes.halonet((8, 7), (3, 2), (1, 2), edge="shift"),
        1,
        56,
        on_grid(
            (8, 7),
            lambda a, b: (
                min(max(a[0] // 3 * 3 - 1, 0), 3) <= b[0] < min(max(a[0] // 3 * 3 - 1, 0), 3) + 5
                and min(max(a[1] // 2 * 2 - 2, 0), 1) <= b[1] < min(max(a[1] // 2 * 2 - 2, 0), 1) + 6
            ),
        ),
    ),
    "nat": (
        recipes.nat((6, 7), (3, 5)),
        1,
        42,
        on_grid((6, 7), lambda a, b: nearest(a[0], b[0], 6, 3) and nearest(a[1], b[1], 7, 5)),
    ),
    "dinat": (
        recipes.dinat((7, 8), 3, 2),
        1,
        56,
        on_grid((7, 8), lambda a, b: dilated_nearest(a[0], b[0], 7, 3, 2) and dilated_nearest(a[1], b[1], 8, 3, 2)),
    ),
    "gna": (
        recipes.gna((8, 8), 4, 2),
        1,
        64,
        on_grid((8, 8), lambda a, b: all(nearest(x // 2 * 2 + 1, y, 8, 4) for x, y in zip(a, b, strict=True))),
    ),
    "axial": (
        recipes.axial((3, 4, 5)),
        1,
        60,
        on_grid((3, 4, 5), lambda a, b: sum(x != y for x, y in zip(a, b, strict=True)) <= 1),
    ),
    "local_global_heads": (
        recipes.local_global_heads([1, 3], 4, sinks=2),
        5,
        15,
        lambda h, i, j: j <= i and (h in (1, 3) or i - 3 <= j or j < 2),
    ),
    "local_global_heads both ways": (
        recipes.local_global_heads(0, 4, causal=False),
        2,
        15,
        lambda h, i, j: h == 0 or abs(i - j) <= 3,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_recipe_is_what_the_paper_says(case: str) -> None:
    pattern, heads, length, sees = CASES[case]
    want = torch.tensor([[[sees(h, i, j) for j in range(length)] for i in range(length)] for h in range(heads)])
    assert torch.equal(pattern.mask(length, length, num_heads=heads).expand(heads, -1, -1), want)
    assert parse(str(pattern)) == pattern


def test_every_recipe_names_its_source_and_is_tested() -> None:
    own = {name: f for name, f in vars(recipes).items() if inspect.isfunction(f) and f.__module__ == recipes.__name__}
    assert {case.split()[0] for case in CASES} == set(own)
    assert all(re.search(r"arXiv:\d{4}\.\d{5}", f.__doc__ or "") for f in own.values())
    assert attnopt.recipes is recipes


def test_shifted_groups_do_not_look_ahead() -> None:
    """The roll of the published code lets the first half group of shifted heads see the end of the sequence."""
    mask = recipes.s2_attn(16, heads=2).mask(64, 64, num_heads=2)
    assert not (mask & torch.ones(64, 64, dtype=torch.bool).triu(1)).any()
    rolled = (torch.arange(64) - 8) % 64
    published = (rolled[:, None] // 16 == rolled // 16) & (rolled[:, None] >= rolled)
    assert (published & ~mask[1]).sum() == 64, "so many pairs of the published pattern are in the future"
    assert not (mask[1] & ~published).any()


def test_random_blocks_of_bigbird() -> None:
    pattern = recipes.bigbird(4, window=1, random=2, global_blocks=1, blocks=9, seed=3)
    assert pattern.lengths == range(33, 37)
    mask = pattern.mask(36, 36)[0].reshape(9, 4, 9, 4)
    assert mask[:, :1].eq(mask).all()
    kept = mask[:, 0, :, 0]
    assert kept[0].all()
    assert kept[:, 0].all()
    assert kept.diagonal().all()
    assert set(kept[1:].sum(1).tolist()) <= {3, 4}, "the global block, its own, and two more that may be its own"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipes.longformer(-2), "longformer: invalid value window=-2"),
        (lambda: recipes.bigbird(window=0), "bigbird: invalid value window=0"),
        (lambda: recipes.sparse_transformer_fixed(4, 5), "Periodic: invalid value start=-1"),
        (lambda: recipes.streaming_llm(0), "streaming_llm: invalid value window=0"),
        (lambda: recipes.s2_attn(1, 4), "s2_attn: invalid value group=1"),
        (lambda: recipes.longnet([4, 6], [1, 4], 2), "longnet: dilation 4 does not divide segments of 6 tokens"),
        (lambda: recipes.longnet([4, 6], [1], 2), "longnet: invalid value dilations=[1]"),
        (lambda: recipes.swin((4, 4), (2, 2, 2)), "swin: invalid value window=(2, 2, 2)"),
        (lambda: recipes.local_global_heads([0], 0), "local_global_heads: invalid value window=0"),
    ],
)
def test_bad_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert message in str(caught.value)
