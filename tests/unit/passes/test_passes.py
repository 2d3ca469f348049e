"""Each pass on hand-made sites: it matches, nearly matches, must not match, and its law holds on the spec."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from places import ROOT
from sites import D, a_site, applied, refusal, wrong

from attnopt.errors import PolicyError
from attnopt.ir.head_edits import Scaled
from attnopt.ir.interfaces import Pass
from attnopt.passes import Fuse, GroupedQuery, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import (
    BlockLayout,
    Blocks,
    Causal,
    Dilated,
    Full,
    Neighborhood,
    Pattern,
    PerHead,
    Prefix,
    RandomBlocks,
    Segments,
    Sinks,
    Window,
)


def test_fuse_changes_nothing() -> None:
    site = a_site()
    assert Fuse().exact
    assert Fuse().check(site) is None
    assert Fuse().rewrite(site).spec == site.spec


@pytest.mark.parametrize(
    ("p", "pattern"),
    [
        (LocalWindow(3), Window(3, 3)),
        (LocalWindow(3, 0), Window(3, 0)),
        (LocalWindow(3, sinks=2), Window(3, 3) | Sinks(2)),
        (LocalWindow(3, 1, dilation=2), Dilated(3, 1, 2)),
        (LocalWindow(3, heads=[1, 3]), PerHead({(1, 3): Window(3)})),
        (LocalWindow(3, heads=[3, 2, 1, 0]), Window(3)),
        (LocalWindow(3, heads=[]), Full()),
    ],
)
def test_local_window(p: LocalWindow, pattern: Any) -> None:
    assert applied(p, a_site()).spec.pattern == pattern
    assert not p.exact


def test_local_window_stays_causal() -> None:
    causal = a_site(pattern=Causal())
    assert applied(LocalWindow(3), causal).spec.pattern == Causal() & Window(3, 0)
    assert applied(LocalWindow(3, sinks=2), causal).spec.is_causal
    by_mask = a_site(has_mask=True, seen_as=Causal())
    assert applied(LocalWindow(3), by_mask).spec.pattern == Window(3, 0)
    assert applied(LocalWindow(3), by_mask).spec.is_causal


def test_heads_keep_their_original_numbers() -> None:
    pruned = applied(PruneHeads(heads=[0, 3]), a_site())
    windowed = applied(LocalWindow(3, heads=[2, 3]), pruned)
    assert windowed.spec.pattern == PerHead({1: Window(3)})
    assert windowed.spec.heads == (1, 2)
    other_way = applied(PruneHeads(heads=[0, 3]), applied(LocalWindow(3, heads=[2, 3]), a_site()))
    assert other_way.spec == windowed.spec
    assert applied(Sparse("PerHead({(2, 3): Window(3)})"), pruned).spec == windowed.spec
    assert applied(ScaleHeads([1, 2, 3, 4]), pruned).spec.gains == {1: 2.0, 2: 3.0}
    assert applied(ScaleHeads({2: 5.0, 3: 7.0}), pruned).spec.gains == {2: 5.0}
    assert applied(PruneHeads(heads=[0, 1]), pruned).spec.heads == (2,)


@pytest.mark.parametrize("p", [LocalWindow(3), Sparse(Window(3)), Sparse(PerHead({0: Causal()}))])
def test_positions_need_one_sequence(p: Pass) -> None:
    assert refusal(p, a_site(is_cross=True)) == (
        "[needs-self-attention] expected queries and keys from the same sequence, found keys from another sequence "
        '(at model.py:88)\n  hint: exclude cross-attention with a mapping such as {"decoder.*.cross": []}'
    )
    assert "found 12 queries and 15 keys (at" in refusal(p, a_site(kv_len=15))
    assert "[needs-self-attention]" in refusal(p, a_site(kv_len=15, pattern=Causal()))


def test_sinks_alone_need_no_positions() -> None:
    p = Sparse(Sinks(3) & PerHead({0: Sinks(1)}))
    assert applied(p, a_site(is_cross=True)).spec.pattern == p.pattern


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (Neighborhood((2, 7), 3), "expected a sequence of 14 tokens, found 12 tokens (at model.py:88)"),
        (Causal() & Segments([0] * 13), "expected a sequence of 13 tokens, found 12 tokens"),
        (Prefix(1, Neighborhood((3, 4), 3)), "expected a sequence of 13 tokens, found 12 tokens"),
        (PerHead({1: RandomBlocks(4, 1, blocks=4)}), "expected a sequence of 13 to 16 tokens, found 12 tokens"),
        (~BlockLayout([[1, 0], [0, 1]], 5), "expected a sequence of 6 to 10 tokens, found 12 tokens"),
        (
            Neighborhood((3, 4), 3) | Segments([0] * 13),
            "expected a pattern for one length, found several lengths in Neighborhood(",
        ),
    ],
)
def test_a_pattern_for_another_length(pattern: Pattern, found: str) -> None:
    text = refusal(Sparse(pattern), a_site())
    assert text.startswith(f"[wrong-length] {found}")


@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood((3, 4), 3),
        Prefix(3, Neighborhood((3, 3), 3)),
        Segments([0, (1, 11)]),
        RandomBlocks(5, 1, blocks=3),
        RandomBlocks(5, 1),
        BlockLayout([[1, 0], [0, 1]], 7),
        Prefix(3, Window(1)),
    ],
)
def test_a_pattern_for_this_length(pattern: Pattern) -> None:
    assert applied(Sparse(pattern), a_site()).spec.pattern == pattern
    varying = a_site(is_dynamic=True)
    if pattern.lengths is None:
        assert Sparse(pattern).check(varying) is None
    else:
        assert "found a dynamic length" in refusal(Sparse(pattern), varying)
        assert "hint: remove the sequence axis from dynamic_shapes" in refusal(Sparse(pattern), varying)


@pytest.mark.parametrize("pattern", [Window(2, 5), ~Causal(), Full(), Blocks(4, 1), Neighborhood((3, 4), 3)])
def test_a_causal_attention_stays_causal(pattern: Pattern) -> None:
    for causal in (a_site(pattern=Causal()), a_site(has_mask=True, seen_as=Causal())):
        assert applied(Sparse(pattern), causal).spec.is_causal
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)
    assert not (applied(Sparse(pattern), a_site(pattern=Causal())).spec.pattern.mask(12, 12)[0] & later).any()


@pytest.mark.parametrize(
    "p",
    [LocalWindow(3, heads=[1, 4]), Sparse(PerHead({4: Causal()})), PruneHeads(heads=[4]), ScaleHeads({4: 2.0})],
)
def test_unknown_heads(p: Pass) -> None:
    expected = "[unknown-head] expected heads from 0 to 3, found head 4 (at model.py:88)"
    assert refusal(p, a_site()) == expected
    assert refusal(p, applied(PruneHeads(heads=[3]), a_site())) == expected


def test_prune_named_heads() -> None:
    site = applied(PruneHeads(heads=[1, 2]), a_site(heads=4, kv_heads=2))
    assert site.spec.heads == (0, 3)
    assert site.spec.kv_heads == (0, 1)
    assert applied(PruneHeads(heads=[2, 3]), a_site(heads=4, kv_heads=2)).spec.kv_heads == (0,)
    assert applied(PruneHeads(heads=[]), a_site()).spec == a_site().spec


def test_prune_all_heads_is_refused() -> None:
    assert refusal(PruneHeads(heads=range(4)), a_site()) == (
        "[all-heads] expected at least one remaining head, found all 4 heads removed (at model.py:88)\n  hint: use "
        "whole_layers=True to remove the whole attention"
    )
    assert "[all-heads]" in refusal(PruneHeads(heads=[1]), applied(PruneHeads(heads=[0, 2, 3]), a_site()))


def test_prune_by_given_importance() -> None:
    p = PruneHeads(0.5, importance=[3.0, 1.0, 2.0, 1.0])
    rewrite = p.rewrite(a_site())
    assert rewrite.spec.heads == (0, 2)
    assert rewrite.notes == ("prune-heads: removed heads 1, 3 by the given importance",)
    ties = PruneHeads(0.5, importance=[1.0] * 4)
    assert ties.rewrite(a_site()).spec.heads == (0, 1)
    assert refusal(PruneHeads(0.5, importance=[1.0] * 3), a_site()) == (
        "[no-such-site-size] expected one importance score per head (4), found 3 numbers (at model.py:88)"
    )


def test_prune_by_weights() -> None:
    site = a_site(heads=4, kv_heads=2, after=(Scaled(((1, 9.0),)),))
    by_hand = []
    for h in range(4):
        value = site.parameters["v.weight"][h // 2 * D : h // 2 * D + D]
        out = site.parameters["out.weight"][h * D : h * D + D]
        by_hand.append((value.T @ out).norm().item() * (9.0 if h == 1 else 1.0))
    least = min(range(4), key=by_hand.__getitem__)
    rewrite = PruneHeads(0.25).rewrite(site)
    assert rewrite.spec.heads == tuple(h for h in range(4) if h != least)
    assert rewrite.notes == (f"prune-heads: removed heads {least} by the norm of value times output weights",)


def test_prune_needs_importance_where_weights_are_unknown() -> None:
    assert refusal(PruneHeads(0.25), a_site(weights=False)) == (
        "[unknown-projection] expected known value and output projections, found v: a pooling stands in between "
        "(at model.py:88)\n  hint: use importance=, one number per head"
    )
    assert PruneHeads(0.25, importance=[1, 2, 3, 4]).check(a_site(weights=False)) is None


def test_prune_less_than_one_head() -> None:
    rewrite = PruneHeads(0.2).rewrite(a_site())
    assert rewrite.spec == a_site().spec
    assert rewrite.notes == ("prune-heads: the fraction is less than one head, so none was removed",)
    assert PruneHeads(0.7, importance=range(10)).rewrite(a_site(10, 10)).spec.heads == (7, 8, 9)


def test_grouped_query_takes_the_mean() -> None:
    site = a_site(heads=8, kv_heads=4)
    rewrite = GroupedQuery(2).rewrite(site)
    assert GroupedQuery(2).check(site) is None
    assert rewrite.spec.kv_heads == (0, 2)
    assert rewrite.spec.kv_of_head == (0, 0, 0, 0, 1, 1, 1, 1)
    assert [(e.role, e.head) for e in rewrite.edits] == [("k", 0), ("k", 2), ("v", 0), ("v", 2)]
    weight, bias = site.parameters["k.weight"], site.parameters["k.bias"]
    torch.testing.assert_close(rewrite.edits[1].weight, (weight[2 * D : 3 * D] + weight[3 * D :]) / 2)
    torch.testing.assert_close(rewrite.edits[1].bias, (bias[2 * D : 3 * D] + bias[3 * D :]) / 2)
    assert all(e.bias is None for e in GroupedQuery(2).rewrite(a_site(bias=False)).edits)


def test_grouped_query_keeps_identical_heads_bit_for_bit() -> None:
    site = a_site(heads=3, kv_heads=3)
    same = {n: t[:D].repeat(3, *[1] * (t.dim() - 1)) for n, t in site.parameters.items()}
    rewrite = GroupedQuery(1).rewrite(replace(site, parameters=same))
    assert all(torch.equal(e.weight, same[f"{e.role}.weight"][:D]) for e in rewrite.edits)


def test_grouped_query_of_first_or_of_nothing() -> None:
    assert GroupedQuery(1, merge="first").rewrite(a_site()).edits == ()
    assert GroupedQuery(1, merge="first").rewrite(a_site()).spec.kv_heads == (0,)
    unchanged = GroupedQuery(4).rewrite(a_site(weights=False))
    assert GroupedQuery(4).check(a_site(weights=False)) is None
    assert unchanged.spec == a_site().spec
    assert unchanged.edits == ()


@pytest.mark.parametrize("kv_heads", [3, 8])
def test_grouped_query_that_does_not_fit(kv_heads: int) -> None:
    assert refusal(GroupedQuery(kv_heads), a_site()) == (
        f"[kv-heads-do-not-fit] expected kv_heads to be one of 1, 2, 4, found {kv_heads} (at model.py:88)"
    )


def test_grouped_query_needs_projections() -> None:
    assert refusal(GroupedQuery(2), a_site(weights=False)) == (
        "[unknown-projection] expected known key and value projections, found k: a pooling stands in between "
        "(at model.py:88)"
    )
    missing = replace(a_site(), projections={})
    assert "found k: not found" in refusal(GroupedQuery(2), missing)


def test_scale_heads() -> None:
    once = applied(ScaleHeads([1, 2, 3, 4]), a_site())
    assert once.spec.gains == {1: 2.0, 2: 3.0, 3: 4.0}
    assert applied(ScaleHeads({1: 0.5}), once).spec.gains == {2: 3.0, 3: 4.0}
    assert ScaleHeads({2: 1, 0: 3}) == ScaleHeads([(0, 3.0), (2, 1.0)]) == ScaleHeads([[2, 1], [0, 3]])  # type: ignore[arg-type]
    assert ScaleHeads(torch.tensor([1.0, 2.0])) == ScaleHeads([1, 2])  # type: ignore[arg-type]
    assert refusal(ScaleHeads([1, 2]), a_site()) == (
        "[wrong-number-of-gains] expected one gain per head (4), found 2 gains (at model.py:88)"
    )


def test_passes_are_hashable_values() -> None:
    passes = [
        LocalWindow(3, heads=[1, 0]),
        Sparse("Causal()"),
        PruneHeads(heads=[1]),
        PruneHeads(0.5, importance=[1, 2]),
        ScaleHeads({0: 1}),
        ScaleHeads([1, 2]),
        GroupedQuery(2),
        Fuse(),
    ]
    assert len({*passes, *passes}) == len(passes)
    assert LocalWindow(3, heads=[1, 0]) == LocalWindow(3, heads=(0, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalWindow(-1), "local-window: invalid value left=-1: expected an integer from 0 to"),
        (lambda: LocalWindow(1, right=wrong(1.5)), "local-window: invalid value right=1.5"),
        (lambda: LocalWindow(1, sinks=-1), "local-window: invalid value sinks=-1"),
        (lambda: LocalWindow(1, dilation=0), "local-window: invalid value dilation=0: expected an integer from 1 to"),
        (
            lambda: LocalWindow(1, heads=wrong("01")),
            "local-window: invalid value heads='01': expected a sequence of integers",
        ),
        (lambda: LocalWindow(1, heads=[-1]), "local-window: invalid value heads=-1"),
        (
            lambda: Sparse(wrong(3)),
            "sparse: invalid value pattern=3: expected a pattern from attnopt.patterns or its text",
        ),
        (lambda: Sparse("Causl()"), "unknown pattern 'Causl'"),
        (lambda: PruneHeads(), "prune-heads: expected exactly one of fraction and heads"),
        (lambda: PruneHeads(0.5, heads=[1]), "prune-heads: expected exactly one of fraction and heads"),
        (lambda: PruneHeads(1.0), "prune-heads: invalid value fraction=1.0: expected a number from 0 to below 1"),
        (lambda: PruneHeads(float("nan")), "prune-heads: invalid value fraction=nan: expected a finite number"),
        (lambda: PruneHeads(heads=[1], importance=[1]), "prune-heads: importance is only used with fraction"),
        (lambda: PruneHeads(heads=[1], protect=[0]), "prune-heads: protect is only used with fraction"),
        (lambda: PruneHeads(heads=[1], protect={"a": [0]}), "prune-heads: protect is only used with fraction"),
        (lambda: PruneHeads(0.5, importance=[float("inf")]), "prune-heads: invalid value importance=inf"),
        (
            lambda: PruneHeads(0.5, importance=wrong({0: 1})),
            "prune-heads: invalid value importance={0: 1}: expected a sequence of",
        ),
        (lambda: GroupedQuery(0), "grouped-query: invalid value kv_heads=0: expected an integer from 1 to"),
        (
            lambda: GroupedQuery(2, merge="max"),
            "grouped-query: invalid value merge='max': expected one of 'mean', 'first'",
        ),
        (lambda: ScaleHeads([1.0, float("nan")]), "scale-heads: invalid value gains=nan: expected a finite number"),
        (lambda: ScaleHeads({0: float("inf")}), "scale-heads: invalid value gains=inf: expected a finite number"),
        (lambda: ScaleHeads({-1: 1.0}), "scale-heads: invalid value gains=-1: expected an integer from 0"),
        (lambda: ScaleHeads([(0, 1.0), (0, 2.0)]), "expected one number per head"),
        (lambda: ScaleHeads(wrong([(0, 1.0, 2.0)])), "expected numbers, or pairs of a head and its gain"),
        (lambda: ScaleHeads(wrong(3)), "scale-heads: invalid value gains=3: expected a sequence of finite numbers"),
    ],
)
def test_bad_options_say_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.subprocess
@pytest.mark.parametrize("package", ["passes", "backends"])
def test_a_second_copy_of_a_package_is_refused(package: str) -> None:
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=root, capture_output=True, text=True, check=False
    )
    assert f"{package} would be a second copy of attnopt.{package}; import attnopt.{package} instead" in done.stderr
