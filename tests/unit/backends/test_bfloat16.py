"""bfloat16 in the compiled kernel: probabilities and results are rounded once, in every form that this CPU offers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import PATTERNS, a_spec, tensors
from torch import Tensor

from attnopt.backends import dispatch, native
from attnopt.backends.native import Form
from attnopt.ir.operands import OperandTensors, SegmentTensors
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal, Dilated, Full, Pattern, PerHead, Sinks, Strided, Window

if (reason := native.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

FORMS = [form for form in Form if form <= native.library().attnopt_best_form()]
HALF_STEP = 2.0**-8  # the most by which rounding to bfloat16 changes a number, relative to it
MORE: list[Pattern] = [
    Window(70, 0),
    Window(37, 29),
    Dilated(9, 0, 11),
    Causal() & (Window(30, 0) | Sinks(3)),
    PerHead({0: Window(90, 0), 2: Strided(9)}),
]

SPECS = st.builds(
    a_spec,
    heads=st.just(4),
    kv_of_head=st.sampled_from([None, (0, 0, 0, 0), (0, 0, 1, 1), (3, 2, 1, 0), (0, 1, 2, 0)]),
    head_dim=st.sampled_from([1, 5, 8, 31, 32, 33, 64, 65, 96]),
    value_dim=st.sampled_from([1, 3, 16, 17, 40, 64]),
    scale=st.sampled_from([0.35, 0.125, -0.2, 0.0]),
    pattern=st.sampled_from(PATTERNS + MORE),
    has_bias=st.booleans(),
    has_mask=st.booleans(),
    has_sinks=st.booleans(),
    softcap=st.sampled_from([None, None, 2.0]),
)
LENGTHS = (1, 7, 63, 64, 65, 130, 300)


@contextmanager
def computed_as(form: Form) -> Iterator[None]:
    with mock.patch.dict(os.environ, ATTNOPT_BFLOAT16=form.name.lower()):
        yield


def operands(spec: AttentionSpec, L: int, S: int, seed: int) -> OperandTensors:
    t: dict[str, Any] = tensors(spec, 2, L, S, torch.bfloat16, seed)
    t["k"] = t["k"].transpose(1, 2).contiguous().transpose(1, 2)  # as projections leave them
    t["v"] = torch.cat([t["v"], t["v"]], 3)[..., spec.value_dim :]
    return OperandTensors(**t)


def exact(spec: AttentionSpec, t: OperandTensors) -> tuple[Tensor, Tensor, Tensor]:
    """In double precision, by torch: the output, that of the values' sizes, and the log-sum-exp."""
    wide = OperandTensors(
        *(
            x if x is None or not x.is_floating_point() else x.double()
            for x in (t.q, t.k, t.v, t.bias, t.mask, t.sinks)
        ),
        t.selected,
        t.segments,
    )  # type: ignore[arg-type]
    o, top, log_sum = dispatch.forward_with_lse(spec, wide)
    sizes, _, _ = dispatch.forward_with_lse(spec, replace(wide, v=wide.v.abs()))
    return o, sizes, top + log_sum


@settings(max_examples=60, deadline=None)
@given(SPECS, st.sampled_from(LENGTHS), st.sampled_from(LENGTHS), st.integers(0, 99))
def test_probabilities_and_results_are_rounded_once(spec: AttentionSpec, L: int, S: int, seed: int) -> None:
    t = operands(spec, L, S, seed)
    want, sizes, lse = exact(spec, t)
    slack = 2e-5 * sizes + 1e-30
    got = {}
    for form in FORMS:
        with computed_as(form):
            o, top, log_sum = native.attend(spec, t)
        assert o.dtype == torch.bfloat16
        assert o.transpose(1, 2).is_contiguous()
        of_weights = 0.0 if form is Form.FLOAT32 else HALF_STEP
        assert (
            (o.double() - want).abs() <= of_weights * sizes + (1 + of_weights) * HALF_STEP * want.abs() + slack
        ).all()
        torch.testing.assert_close((top + log_sum).double(), lse, rtol=1e-5, atol=2e-5)
        got[form] = o.double()
    for form in FORMS[1:]:
        apart = (got[form] - got[Form.FLOAT32]).abs()
        assert (apart <= HALF_STEP * sizes + 2 * HALF_STEP * want.abs() + slack).all()


@pytest.mark.parametrize("form", FORMS)
def test_rounding_favours_no_side(form: Form) -> None:
    """Values that are all equal come back: what many probabilities lose and gain by rounding is even."""
    q, k, v = torch.randn(3, 1, 2, 300, 64, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    spec = a_spec(heads=2, head_dim=64, value_dim=64, scale=0.125)
    with computed_as(form):
        o, _, _ = native.attend(spec, OperandTensors(q, k, torch.full_like(v, 1.5)))
    assert o.eq(1.5).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", [Sinks(3), Sinks(35), Sinks(64), Sinks(97)])
def test_keys_that_no_query_sees_are_not_read(pattern: Sinks, form: Form) -> None:
    spec = a_spec(heads=1, head_dim=40, value_dim=20, pattern=pattern)
    t = operands(spec, 50, 130, 0)
    t.k[:, :, pattern.n :] = t.v[:, :, pattern.n :] = float("nan")
    with computed_as(form):
        o, _, _ = native.attend(spec, t)
    assert o.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_hidden(broken: float, form: Form) -> None:
    spec = a_spec(heads=1)
    t = operands(spec, 40, 70, 0)
    t.k[0, 0, :2, 0] = torch.tensor([broken, -broken])
    t.k[1, 0, 69, 3] = float("nan")
    with computed_as(form):
        o, _, _ = native.attend(spec, t)
    assert o.isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_segments_and_selected_blocks(form: Form) -> None:
    g = torch.Generator().manual_seed(0)
    spec = a_spec(heads=3, head_dim=33, value_dim=17)
    t = operands(spec, 150, 200, 0)
    queries, keys = (torch.randint(-1, 4, (2, n), generator=g).sort(1).values for n in (150, 200))
    selected = torch.rand((2, 3, 3, 4), generator=g) < 0.5
    of_keys = selected.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :150, :200]
    for way in (replace(t, segments=SegmentTensors(queries, keys)), replace(t, selected=selected)):
        mask = of_keys if way.segments is None else way.segments.mask()
        want, sizes, _ = exact(replace(spec, has_mask=True), replace(t, mask=mask))
        with computed_as(form):
            o, _, _ = native.attend(spec, way)
        assert ((o.double() - want).abs() <= HALF_STEP * sizes + 2 * HALF_STEP * want.abs() + 1e-5).all()


def test_threads_and_other_users_of_tiles_change_nothing() -> None:
    """torch's own products in between leave and find the tiles as they were."""
    q, k, v = torch.randn(3, 2, 3, 300, 64, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    t = OperandTensors(q, k[:1].expand(2, -1, -1, -1), v)
    spec = a_spec(heads=3, head_dim=64, value_dim=64, pattern=Causal())
    threads = torch.get_num_threads()
    first, product = native.attend(spec, t)[0], q @ k.mT
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(q @ k.mT, product)
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            assert torch.equal(native.attend(spec, t)[0], first)
    finally:
        torch.set_num_threads(threads)


def test_float16_and_mixtures_are_computed_in_float32() -> None:
    spec = a_spec(heads=2, pattern=Full())
    wide = operands(spec, 70, 90, 0)
    for dtypes in ((torch.float16,) * 3, (torch.bfloat16, torch.bfloat16, torch.float32)):
        q, k, v = (x.to(dtype) for x, dtype in zip((wide.q, wide.k, wide.v), dtypes, strict=True))
        o, _, _ = native.attend(spec, OperandTensors(q, k, v))
        want, _, _ = native.attend(spec, OperandTensors(q.float(), k.float(), v.float()))
        assert o.dtype == v.dtype
        assert torch.equal(o, want.to(v.dtype))


def test_a_form_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_BFLOAT16", "cubes")
    with pytest.raises(ValueError, match=r"ATTNOPT_BFLOAT16 is 'cubes'; this CPU, compiler and system offer float32"):
        native.attend(a_spec(), operands(a_spec(), 3, 3, 0))
