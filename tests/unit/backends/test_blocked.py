"""The kernel and the gathered blocks give what the reference gives, and cost what the pattern keeps."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler
from specs import PATTERNS, a_spec, run, tensors
from torch import Tensor

import attnopt
from attnopt.backends import Blocked, Reference, block_gather, dispatch, flex, native
from attnopt.backends.attention_operator import attention
from attnopt.errors import AttnoptWarning
from attnopt.ir.operands import OperandTensors
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import BlockLayout, Causal, Dilated, Full, Neighborhood, Pattern, PerHead, Sinks, Strided, Window
from attnopt.patterns.query_order import order_of, ordered_layout

MORE: list[Pattern] = [
    Window(70, 0),
    Dilated(4, 3, 5),
    Dilated(9, 0, 11),
    Causal() & (Window(30, 0) | Sinks(3)),
    PerHead({0: Window(90, 0), 2: Strided(9)}),
    ~Window(50),
]

SPECS = st.builds(
    a_spec,
    heads=st.just(4),
    kv_of_head=st.sampled_from([None, (0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (3, 2, 1, 0), (0, 1, 2, 0)]),
    head_dim=st.sampled_from([5, 8, 16, 20, 64]),
    value_dim=st.sampled_from([3, 8, 16, 40]),
    scale=st.sampled_from([0.35, 1.0, -0.2]),
    pattern=st.sampled_from(PATTERNS + MORE),
    has_bias=st.booleans(),
    has_mask=st.booleans(),
    has_sinks=st.booleans(),
    softcap=st.sampled_from([None, None, 2.0]),
)


def narrowed(t: dict[str, Any], axes: dict[str, int]) -> dict[str, Any]:
    """The operands with some axes of size 1, as they may come."""
    return {name: x if x is None or name not in axes else x.narrow(axes[name], 0, 1) for name, x in t.items()}


@settings(max_examples=120, deadline=None)
@given(
    SPECS,
    st.sampled_from([1, 3, 40, 64, 100, 150, 300]),
    st.sampled_from([1, 7, 64, 65, 130, 300]),
    st.sampled_from([{}, {"bias": 2}, {"bias": 1, "mask": 2}, {"mask": 0}]),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_both_forms_equal_the_reference(
    spec: AttentionSpec, L: int, S: int, narrow: dict[str, int], dtype: torch.dtype, seed: int
) -> None:
    t = narrowed(tensors(spec, 2, L, S, dtype, seed), narrow)
    t["k"] = t["k"].transpose(1, 2).contiguous().transpose(1, 2)  # as projections leave it
    expected = run(Reference(), spec, t)
    near = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(run(Blocked(), spec, t), expected, **near)
    gathered = block_gather.attend(spec, OperandTensors(**t))
    torch.testing.assert_close(gathered, expected, **near)


@pytest.mark.parametrize("pattern", [Window(60, 0), Window(70, 70), Causal() & (Window(130) | Sinks(3))])
def test_windows_that_leave_out_the_first_keys(pattern: Pattern) -> None:
    """Their blocks are read as a sliding window where they are one."""
    spec = a_spec(pattern=pattern)
    t = tensors(spec, 2, 200, 520, torch.float32, 3)
    gathered = block_gather.attend(spec, OperandTensors(**t))
    torch.testing.assert_close(gathered, run(Reference(), spec, t), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # that is what is wanted here
@settings(max_examples=40, deadline=None)
@given(
    SPECS,
    st.sampled_from([1, 40, 128, 150, 300]),
    st.sampled_from([1, 65, 130, 300]),
    st.sampled_from([{}, {"bias": 2}, {"bias": 1, "mask": 2}, {"mask": 0}]),
    st.integers(0, 99),
)
def test_flex_attention_equals_the_reference(
    spec: AttentionSpec, L: int, S: int, narrow: dict[str, int], seed: int
) -> None:
    """FlexAttention as it is on a CPU: every pair is computed and looked up, so the tables are checked, not the skipping."""
    t = narrowed(tensors(spec, 2, L, S, torch.float32, seed), narrow)
    got = flex.attend(spec, OperandTensors(**t))
    torch.testing.assert_close(got, run(Reference(), spec, t), rtol=2e-5, atol=2e-5)
    if not spec.has_mask:
        blocks = flex._block_mask(spec.pattern, 4, L, S, torch.device("cpu")).to_dense()
        seen = spec.pattern.mask(L, S, num_heads=4)
        padded = torch.nn.functional.pad(seen, (0, -S % 128, 0, -L % 128))
        kept = padded.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).any(-1).any(2)
        assert torch.equal(blocks[0].bool(), kept)


@pytest.mark.gpu
@settings(max_examples=20, deadline=None)
@given(SPECS, st.sampled_from([1, 130, 300]), st.sampled_from([1, 130, 300]), st.integers(0, 99))
def test_on_a_gpu(spec: AttentionSpec, L: int, S: int, seed: int) -> None:
    """Forward and backward, compiled."""
    t = {n: None if x is None else x.cuda() for n, x in tensors(spec, 2, L, S, torch.float32, seed).items()}
    floats = [name for name, x in t.items() if x is not None and x.is_floating_point()]
    found = []
    for backend in (Reference(), Blocked()):
        leaves = {n: x.clone().requires_grad_() if n in floats and x is not None else x for n, x in t.items()}
        o = run(backend, spec, leaves)
        (o**2).sum().backward()  # type: ignore[no-untyped-call]
        found.append([o.detach(), *(leaves[n].grad for n in floats)])  # type: ignore[union-attr]
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("length", range(1, 300, 13))
def test_every_length(length: int) -> None:
    for pattern in (Causal(), Window(20, 0), Window(64, 64), Causal() & (Window(7, 0) | Sinks(2))):
        spec = a_spec(pattern=pattern)
        for q_len in {1, length}:
            t = tensors(spec, 1, q_len, length, torch.float32, length)
            torch.testing.assert_close(run(Blocked(), spec, t), run(Reference(), spec, t), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kv_of_head", [None, (0, 1, 0, 1)])
@pytest.mark.parametrize("alone", [{}, {"k": 0}, {"v": 0}])
@pytest.mark.parametrize("pattern", [Full(), Window(70, 9)])
def test_rows_of_many_heads_beside_each_other(
    kv_of_head: tuple[int, ...] | None, alone: dict[str, int], pattern: Pattern
) -> None:
    """As projections leave them: [B, L, H, D], whose rows the kernel copies.  ``alone``: operands that all sequences share."""
    spec = a_spec(pattern=pattern, kv_of_head=kv_of_head, value_dim=24)
    t = narrowed(tensors(spec, 3, 150, 205, torch.float32, 0), alone)
    apart = {n: x if n not in "qkv" else x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in t.items()}
    want = run(Reference(), spec, t)
    torch.testing.assert_close(run(Blocked(), spec, apart), want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(block_gather.attend(spec, OperandTensors(**apart)), want, rtol=2e-5, atol=2e-5)


def test_a_bias_may_have_its_heads_last() -> None:
    """As T5 leaves it: looked up by distance, then permuted."""
    spec = a_spec(has_bias=True)
    t = tensors(spec, 1, 70, 90, torch.float32, 0)
    t["bias"] = torch.randn(70, 90, 4).permute(2, 0, 1).unsqueeze(0)
    torch.testing.assert_close(run(Blocked(), spec, t), run(Reference(), spec, t), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood((16, 24), 7),
        Neighborhood((16, 24), (3, 5), dilation=(2, 1), causal=(True, False)),
        Neighborhood((4, 8, 12), 3, edge="clip"),
        BlockLayout([[i == j or (3 * i) % 5 == j for j in range(6)] for i in range(6)], 64),
    ],
)
def test_patterns_of_one_length(pattern: Pattern) -> None:
    spec = a_spec(pattern=pattern)
    t = tensors(spec, 1, 384, 384, torch.float32, 0)
    torch.testing.assert_close(run(Blocked(), spec, t), run(Reference(), spec, t), rtol=2e-5, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([Full(), Causal(), Window(40, 3)]), st.integers(0, 99))
def test_blocks_that_are_not_selected_are_hidden(pattern: Pattern, seed: int) -> None:
    spec = a_spec(heads=3, pattern=pattern, has_mask=True)
    t: dict[str, Any] = tensors(spec, 2, 150, 200, torch.float32, seed)
    selected = torch.rand((2, 3, 3, 4), generator=torch.Generator().manual_seed(seed)) < 0.5
    t["mask"] = selected.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :150, :200]
    expected = run(Reference(), spec, t)
    q, k, v = t["q"], t["k"], t["v"]
    got = attention(q, k, v, None, None, None, pattern.to_json(), spec.kv_of_head, spec.scale, None, selected)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    plain = replace(spec, has_mask=False)
    gathered = block_gather.attend(plain, OperandTensors(q, k, v, selected=selected))
    torch.testing.assert_close(gathered, expected, rtol=2e-5, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(SPECS, st.integers(0, 99))
def test_gradients_equal_those_of_the_reference(spec: AttentionSpec, seed: int) -> None:
    t = tensors(spec, 2, 70, 90, torch.float32, seed)
    floats = [name for name, x in t.items() if x is not None and x.is_floating_point()]
    grads: list[list[Tensor]] = []
    for backend in (Reference(), Blocked()):
        leaves = {n: x.clone().requires_grad_() if n in floats and x is not None else x for n, x in t.items()}
        (run(backend, spec, leaves) ** 2).sum().backward()  # type: ignore[no-untyped-call]
        grads.append([leaves[n].grad for n in floats])  # type: ignore[union-attr, misc]
    for found, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_operator_keeps_torchs_rules() -> None:
    q, k, v = torch.randn(3, 1, 2, 70, 8).unbind()
    arguments = (q, k, v, None, None, None, "Causal()", [0, 1], 0.3, None)
    torch.library.opcheck(
        attention, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_hidden(broken: float) -> None:
    spec = a_spec(heads=1)
    t: dict[str, Any] = tensors(spec, 1, 4, 4, torch.float32, 0)
    t["k"][0, 0, :2, 0] = torch.tensor([broken, -broken])
    got = run(Blocked(), spec, t)
    assert torch.isnan(got).all()
    torch.testing.assert_close(got, run(Reference(), spec, t), equal_nan=True)


def test_an_order_of_queries_is_a_permutation_with_the_same_pairs() -> None:
    for pattern in (Neighborhood((5, 11), 3), Dilated(3, 0, 4), Causal() & Strided(6), Window(3)):
        order = order_of(pattern, 55)
        assert (order is None) == (pattern == Window(3))
        places = np.arange(55) if order is None else order
        assert sorted(places) == list(range(55))
        found = ordered_layout(pattern, 55, 55, 8, 8)
        dense = np.zeros((56, 56), bool)
        for row, col, tile in zip(found.rows, found.cols, found.tile, strict=True):
            dense[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] = True if tile < 0 else found.tiles[tile]
        assert (dense[:55, :55] == pattern.mask(55, 55)[0].numpy()[places]).all()


def test_the_cheapest_backend_is_blocked_where_it_saves() -> None:
    model = torch.nn.TransformerEncoderLayer(64, 4, 64, batch_first=True).eval()
    fast = attnopt.optimize(model, "local-window(left=32)", (torch.randn(1, 2048, 64),))
    assert [s.backend for s in fast.report.sites] == ["blocked"]
    assert "attnopt.attention" in fast.graph_module.code


@needs_compiler
def test_time_grows_with_what_is_kept() -> None:
    """Eight times the length takes far less than the 64 times that all pairs would."""

    def seconds(length: int) -> float:
        q, k, v = torch.randn(3, 1, 4, length, 64).unbind()
        call = (q, k, v, None, None, None, "Window(left=63, right=0)", [0, 1, 2, 3], 0.125, None)
        attention(*call)
        start = time.process_time()
        for _ in range(5):
            attention(*call)
        return time.process_time() - start

    assert min(seconds(8192) for _ in range(3)) < 32 * min(seconds(1024) for _ in range(3))


def test_without_a_compiler_torch_does_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    native._built.cache_clear()
    dispatch._warn.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    spec = a_spec(pattern=Window(20, 0))
    t = tensors(spec, 1, 100, 100, torch.float32, 0)
    try:
        with pytest.warns(AttnoptWarning, match=r"without its compiled kernel: there is no C\+\+ compiler"):
            got = run(Blocked(), spec, t)
        assert Blocked().notes(spec) == (
            "blocked: using torch operators instead of the compiled kernel: there is no C++ compiler "
            "(g++, clang++, or the one that CXX names)",
        )
    finally:
        native._built.cache_clear()
    torch.testing.assert_close(got, run(Reference(), spec, t), rtol=2e-5, atol=2e-5)


@needs_compiler
def test_the_kernel_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "cache"))
    native._built.cache_clear()
    try:
        assert native.why_not() is None
        (library,) = (tmp_path / "cache").iterdir()
        built = library.stat().st_mtime_ns
        native._built.cache_clear()
        assert native.why_not() is None
        assert library.stat().st_mtime_ns == built
    finally:
        native._built.cache_clear()


@pytest.mark.parametrize(
    ("told", "quoted"),
    [
        ("out of vectors", "out of vectors"),
        ("In a.h:\na.h:1: error: no vectors\nnote: none", "a.h:1: error: no vectors"),
    ],
)
def test_a_compiler_that_fails_is_quoted(
    told: str, quoted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo broken && exit 0\necho "{told}" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "cache"))
    native._built.cache_clear()
    try:
        assert native.why_not() == f"{broken} failed: {quoted}"
        assert list((tmp_path / "cache").iterdir()) == []
    finally:
        native._built.cache_clear()
