"""Half precision in the compiled kernel: one rounding of probabilities and results, in every form that this CPU offers."""

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
from needs import HAS_COMPILER
from specs import PATTERNS, a_spec, tensors
from torch import Tensor

from attnopt.backends import dispatch, native, speed
from attnopt.backends.native import Form
from attnopt.ir.operands import OperandTensors, SegmentTensors
from attnopt.ir.projection import Projection
from attnopt.ir.site import InputTensor, Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal, Dilated, Full, Pattern, PerHead, Sinks, Strided, Window

if not HAS_COMPILER:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

FORMS = [form for form in Form if form <= native.library().attnopt_best_form()]
TYPES = (torch.bfloat16, torch.float16)
# The most by which rounding changes a result, and a probability: float16 is computed in two parts of bfloat16.
OF_RESULT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OF_WEIGHT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-16}
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
    with mock.patch.dict(os.environ, ATTNOPT_HALF=form.name.lower()):
        yield


def operands(spec: AttentionSpec, L: int, S: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> OperandTensors:
    t: dict[str, Any] = tensors(spec, 2, L, S, dtype, seed)
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


def allowed(form: Form, dtype: torch.dtype, want: Tensor, sizes: Tensor) -> Tensor:
    """How far a result may be from the exact one: roundings, and what sums of float32 lose."""
    of_weight = 0.0 if form is Form.FLOAT32 else OF_WEIGHT[dtype]
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return of_weight * sizes + (1 + of_weight) * OF_RESULT[dtype] * want.abs() + 2e-5 * sizes + least


@settings(max_examples=80, deadline=None)
@given(SPECS, st.sampled_from(LENGTHS), st.sampled_from(LENGTHS), st.sampled_from(TYPES), st.integers(0, 99))
def test_probabilities_and_results_are_rounded_once(
    spec: AttentionSpec, L: int, S: int, dtype: torch.dtype, seed: int
) -> None:
    t = operands(spec, L, S, seed, dtype)
    want, sizes, lse = exact(spec, t)
    got = {}
    for form in FORMS:
        with computed_as(form):
            o, top, log_sum = native.attend(spec, t)
        assert o.dtype == dtype
        assert o.transpose(1, 2).is_contiguous()
        assert ((o.double() - want).abs() <= allowed(form, dtype, want, sizes)).all()
        torch.testing.assert_close((top + log_sum).double(), lse, rtol=1e-5, atol=2e-5)
        got[form] = o.double()
    for form in FORMS[1:]:
        apart = (got[form] - got[Form.FLOAT32]).abs()
        room = allowed(form, dtype, want, sizes) + allowed(Form.FLOAT32, dtype, want, sizes)
        assert (apart <= room).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_rounding_favours_no_side(form: Form, dtype: torch.dtype) -> None:
    """Values that are all equal come back: what many probabilities lose and gain by rounding is even."""
    q, k, v = torch.randn(3, 1, 2, 300, 64, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    spec = a_spec(heads=2, head_dim=64, value_dim=64, scale=0.125)
    with computed_as(form):
        o, _, _ = native.attend(spec, OperandTensors(q, k, torch.full_like(v, 1.5)))
    assert o.eq(1.5).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", [Sinks(3), Sinks(35), Sinks(64), Sinks(97)])
def test_keys_that_no_query_sees_are_not_read(pattern: Sinks, form: Form, dtype: torch.dtype) -> None:
    spec = a_spec(heads=1, head_dim=40, value_dim=20, pattern=pattern)
    t = operands(spec, 50, 130, 0, dtype)
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
        assert ((o.double() - want).abs() <= allowed(form, o.dtype, want, sizes)).all()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, *TYPES])
@pytest.mark.parametrize("form", FORMS)
def test_rows_in_step_are_what_each_is_alone(form: Form, dtype: torch.dtype) -> None:
    """So many keys that no cache holds them: several rows of blocks take them in step, the last task fewer."""
    spec = a_spec(heads=3, head_dim=64, value_dim=48, has_bias=True, has_mask=True, has_sinks=True)
    t = operands(spec, 330, 5000, 0, dtype)
    with computed_as(form), threads(1):
        whole = native.attend(spec, t)
        alone = [native.attend(spec, rows_of(t, first, 64)) for first in range(0, 330, 64)]
        for at_once, parts in zip(whole, zip(*alone, strict=True), strict=True):
            assert torch.equal(at_once, torch.cat(parts, 2))


def rows_of(t: OperandTensors, first: int, count: int) -> OperandTensors:
    """The operands of some queries."""
    rows = {
        name: x[:, :, first : first + count] for name in ("q", "bias", "mask") if (x := getattr(t, name)) is not None
    }
    return replace(t, **rows)


@pytest.mark.parametrize("pattern", [Causal(), PerHead({1: Window(90, 0), 2: Causal()})])
@pytest.mark.parametrize("form", FORMS)
def test_rows_in_step_see_what_is_theirs(form: Form, pattern: Pattern) -> None:
    spec = a_spec(heads=3, head_dim=33, value_dim=65, pattern=pattern)
    t = operands(spec, 330, 9000, 1)
    want, sizes, _ = exact(spec, t)
    for count in (1, 2):
        with computed_as(form), threads(count):
            o = native.attend(spec, t)[0]
        assert ((o.double() - want).abs() <= allowed(form, o.dtype, want, sizes)).all()


def test_threads_and_other_users_of_tiles_change_nothing() -> None:
    """torch's own products in between leave and find the tiles as they were."""
    q, k, v = torch.randn(3, 2, 3, 300, 64, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    t = OperandTensors(q, k[:1].expand(2, -1, -1, -1), v)
    spec = a_spec(heads=3, head_dim=64, value_dim=64, pattern=Causal())
    first, product = native.attend(spec, t)[0], q @ k.mT
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(q @ k.mT, product)
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            assert torch.equal(native.attend(spec, t)[0], first)


def test_what_is_computed_in_float32() -> None:
    """Mixtures of types, float16 without tiles, and half precision on demand: the inputs are widened, the output is rounded."""
    spec = a_spec(heads=2, pattern=Full())
    t = operands(spec, 70, 90, 0)
    half, single = torch.float16, torch.float32
    cases = [
        (replace(t, v=t.v.float()), FORMS[-1]),
        (replace(t, q=t.q.float() * 1.01), FORMS[-1]),
        (t, Form.FLOAT32),
        (as_type(t, half), min(FORMS[-1], Form.PAIRS)),
    ]
    for given_, form in cases:
        with computed_as(form):
            o, _, _ = native.attend(spec, given_)
        want, _, _ = native.attend(spec, as_type(given_, single))
        assert o.dtype == given_.v.dtype
        assert torch.equal(o, want.to(o.dtype))


def as_type(t: OperandTensors, dtype: torch.dtype) -> OperandTensors:
    return replace(t, q=t.q.to(dtype), k=t.k.to(dtype), v=t.v.to(dtype))


@pytest.mark.parametrize("pattern", [Full(), Strided(9), Window(0), Causal()])
def test_keys_that_lie_apart_are_computed_in_float32(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the blocks that are visited, the share of the pairs that are seen decides."""
    monkeypatch.delenv("ATTNOPT_HALF", raising=False)
    L, S = 150, 170
    seen = pattern.mask(L, S)[0]
    padded = torch.nn.functional.pad(seen, (0, -S % 64, 0, -L % 64))
    blocks = padded.unflatten(1, (-1, 64)).unflatten(0, (-1, 64)).any(-1).any(1)
    visited = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:L, :S].sum()
    assert native._table(a_spec(pattern=pattern), L, S, False).seen == pytest.approx(float(seen.sum() / visited))
    assert native.form_of(torch.bfloat16, 0.1) is native.form_of(torch.float16, 0.7) is Form.FLOAT32
    assert native.form_of(torch.bfloat16) == native.library().attnopt_own_form()


def test_a_form_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_HALF", "cubes")
    with pytest.raises(ValueError, match=r"ATTNOPT_HALF is 'cubes'; this CPU, compiler and system offer float32"):
        native.attend(a_spec(), operands(a_spec(), 3, 3, 0))


def test_speeds_are_those_in_the_precision_of_its_weights() -> None:
    def site(weight: torch.dtype | None, given_: torch.dtype) -> Site:
        named = {} if weight is None else {"q.weight": torch.zeros(1, dtype=weight)}
        projections = {"q": Projection("q.weight" if named else None)}
        return Site("", a_spec(), projections, parameters=named, inputs={"x": InputTensor((1,), given_)})

    single, double, half, brain = torch.float32, torch.float64, torch.float16, torch.bfloat16
    cases = [(brain, single), (half, brain), (single, half), (None, half), (double, double), (None, torch.int64)]
    assert [speed._precision(site(*case)) for case in cases] == [brain, half, single, half, single, single]
