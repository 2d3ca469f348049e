"""ONNX export: every form gives what the reference gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_core import PATTERNS, captured, check, make_spec, run
from torch import Tensor, nn
from torch.nn import functional

from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export import choose_form
from attnopt.onnx.export.export import export_onnx
from attnopt.patterns import Blocks, Causal, Dilated, Full, Pattern, Sinks, Strided, Window
from attnopt.patterns.bands import Band


@pytest.fixture
def sparse_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of long sequences, at lengths that a test can afford."""
    monkeypatch.setattr(choose_form, "ITERATION", 0.0)
    monkeypatch.setattr(choose_form, "DENSE", 100.0)
    choose_form._gathered.cache_clear()


# ---------------------------------------------------------------- every form equals the reference
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.usefixtures("sparse_pays")
def test_sparse_forms_at_fixed_lengths(pattern: Pattern, tmp_path: Path) -> None:
    by_token = PATTERNS.index(pattern) % 2 == 0
    taken = check(tmp_path / "m.onnx", make_spec(pattern), (2, 150, 150), by_token=by_token)
    wanted = "per head" if pattern.is_per_head else "blocks" if pattern.bands else "gathered"
    assert taken == ["Attention" if pattern == Full() else wanted]


@pytest.mark.parametrize("kv_of_head", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0)], ids=str)
@pytest.mark.usefixtures("sparse_pays")
def test_heads_with_patterns_of_their_own_share_keys(kv_of_head: tuple[int, ...], tmp_path: Path) -> None:
    assert check(tmp_path / "m.onnx", make_spec(PATTERNS[-1], kv_of_head), (2, 40, 40)) == ["per head"]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dynamic_lengths(pattern: Pattern, tmp_path: Path) -> None:
    check(tmp_path / "m.onnx", make_spec(pattern), (2, 70, 70), others=((1, 130, 130), (3, 1, 1), (2, 300, 300)))


@pytest.mark.parametrize("pattern", [Causal(), Window(3, 2), Causal() & (Window(9, 0) | Sinks(4))], ids=str)
def test_fewer_and_more_queries_than_keys(pattern: Pattern, tmp_path: Path) -> None:
    others = ((2, 1, 64), (1, 64, 65), (1, 5, 300), (1, 90, 37))
    check(tmp_path / "m.onnx", make_spec(pattern), (2, 37, 90), others=others, by_token=False)


@pytest.mark.parametrize(
    ("pattern", "thin"),
    [
        (Full(), (1, 2)),
        (Full(), (0, 1)),
        (Window(9, 0) | Sinks(2), ()),
        (Window(9, 0) | Sinks(2), (2,)),
        (Blocks(16, 2), (1, 2)),
        (Blocks(16, 2), (0, 1, 3)),
        (PATTERNS[-1], (0,)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("sparse_pays")
def test_masks_and_biases_with_broadcast_axes(pattern: Pattern, thin: tuple[int, ...], tmp_path: Path) -> None:
    is_static = bool(thin) or pattern.is_per_head
    spec = make_spec(pattern, (0, 0, 1, 1), has_bias=True, has_mask=True, has_sinks=bool(thin), softcap=2.0)
    check(tmp_path / "m.onnx", spec, (2, 70, 70), others=() if is_static else ((1, 33, 33),), thin=thin)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    kv_of_head=st.sampled_from([(0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)]),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 150), st.integers(1, 300)),
    dim=st.sampled_from([8, 7]),
    value_dim=st.sampled_from([8, 5]),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([0.4, -0.3]),
    flavor=st.sampled_from(["onnxruntime", "standard"]),
    is_square=st.booleans(),
    by_token=st.booleans(),
)
@pytest.mark.usefixtures("sparse_pays")
def test_random_specs(
    tmp_path: Path, pattern: Pattern, kv_of_head: tuple[int, ...], sizes: Any, dim: int, value_dim: int, has: Any,
    softcap: float | None, scale: float, flavor: str, is_square: bool, by_token: bool,
) -> None:  # fmt: skip
    names = dict(zip(("has_bias", "has_mask", "has_sinks"), has, strict=True))
    spec = make_spec(pattern, kv_of_head, dim, value_dim=value_dim, softcap=softcap, scale=scale, **names)
    batch, q_len, kv_len = sizes
    at = (batch, q_len, q_len if is_square else kv_len)
    check(tmp_path / "m.onnx", spec, at, flavor=flavor, by_token=by_token)


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(20, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.usefixtures("sparse_pays")
def test_other_precisions(pattern: Pattern, dtype: torch.dtype, tmp_path: Path) -> None:
    check(tmp_path / "m.onnx", make_spec(pattern, has_bias=pattern == Full()), (1, 70, 70), dtype=dtype)


# ---------------------------------------------------------------- which form is taken
@pytest.mark.parametrize(
    ("spec", "length", "flavor", "form"),
    [
        (make_spec(dim=64), 400, "onnxruntime", "MultiHeadAttention"),
        (make_spec(dim=63), 400, "onnxruntime", "MultiHeadAttention"),
        (make_spec(dim=64), 400, "standard", "Attention"),
        (make_spec(dim=64), 32, "onnxruntime", "Attention"),
        (make_spec(dim=64, softcap=3.0), 400, "onnxruntime", "Attention"),
        (make_spec(Causal(), dim=8), 1100, "onnxruntime", "GroupQueryAttention"),
        (make_spec(Causal(), (0, 0, 1, 1), dim=8, softcap=2.0), 1100, "onnxruntime", "GroupQueryAttention"),
        (make_spec(Causal(), dim=12), 1100, "onnxruntime", "blocks"),
        (make_spec(Causal(), dim=8), 1100, "standard", "blocks"),
        (make_spec(Causal(), (0, 1, 0, 1), dim=8), 1100, "onnxruntime", "blocks"),
        (make_spec(Window(2, 0)), 16, "onnxruntime", "Attention"),
    ],
    ids=str,
)
def test_the_form_that_is_taken(spec: AttentionSpec, length: int, flavor: Any, form: str, tmp_path: Path) -> None:
    assert check(tmp_path / "m.onnx", spec, (1, length, length), flavor=flavor) == [form]


def test_group_query_attention_at_dynamic_lengths(tmp_path: Path) -> None:
    spec = make_spec(Causal(), (0, 0, 1, 1))
    assert check(tmp_path / "m.onnx", spec, (2, 1030, 1030), others=((1, 1, 1), (3, 70, 70))) == ["GroupQueryAttention"]


def test_the_standard_flavor_has_no_other_operators(tmp_path: Path) -> None:
    check(tmp_path / "m.onnx", make_spec(Causal(), dim=8), (1, 1100, 1100), flavor="standard")
    assert {i.domain for i in onnx.load(tmp_path / "m.onnx").opset_import} == {""}


def test_bands() -> None:
    assert (Causal() & (Window(9, 3) | Sinks(4))).bands == (Band(-9, 0), Band(high=0, first=4))
    assert (Dilated(3, 1, 4) & Strided(6)).bands == (Band(-12, 4, 12),)
    assert (Window(3, 3) | Window(1, 1)).bands == (Band(-3, 3),)
    assert (Blocks(4) & Causal()).bands is None


# ---------------------------------------------------------------- torch's own operator
class Plain(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *operands: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*operands, **self.options)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((3, 9, 8), (3, 11, 8), (3, 11, 8)), {}),
        (((3, 9, 8), (3, 11, 8), (3, 11, 8), (9, 11)), {}),
        (((2, 3, 4, 9, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8)), {"is_causal": True}),
        (((2, 3, 4, 9, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8), (3, 1, 9, 9)), {"scale": 0.3}),
        (((2, 4, 9, 8), (2, 4, 12, 8), (2, 4, 12, 8)), {"is_causal": True}),
        (((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8)), {"enable_gqa": True}),
        (((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)), {"enable_gqa": True}),
    ],
    ids=str,
)
def test_scaled_dot_product_attention(shapes: Any, options: dict[str, Any], tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(*shape, generator=random) for shape in shapes)
    gm, origin = captured(Plain(**options), args)
    export_onnx(gm, origin, tmp_path / "m.onnx", flavor="onnxruntime", opset=None, external_data="auto", verify=True)
    oracle.assert_same(run(tmp_path / "m.onnx", args), [Plain(**options)(*args)])


class Selecting(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
        return torch.ops.attnopt.attention(q, k, v, None, None, None, "Causal()", [0, 0], 0.4, None, selected)


def test_selected_blocks(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 130, 8, generator=random) for heads in (2, 1, 1))
    selected = torch.rand(1, 2, 3, 3, generator=random) > 0.5
    gm, origin = captured(Selecting(), (q, k, v, selected))
    export_onnx(gm, origin, tmp_path / "m.onnx", flavor="onnxruntime", opset=None, external_data="auto", verify=True)
    oracle.assert_same(run(tmp_path / "m.onnx", (q, k, v, selected)), [Selecting()(q, k, v, selected)])


@pytest.mark.parametrize("floor", [-torch.inf, torch.finfo(torch.float32).min, -1e4], ids=str)
def test_rows_that_see_nothing(floor: float, tmp_path: Path) -> None:
    """Zeros under -inf, the mean of all values under a large number: as torch has it, never NaN."""
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 8, generator=random).unbind()
    mask = torch.zeros(1, 1, 300, 300)
    mask[:, :, :2] = floor
    mask[:, :, 2:, 40:] = floor
    gm, origin = captured(Plain(), (q, k, v, mask))
    export_onnx(gm, origin, tmp_path / "m.onnx", flavor="onnxruntime", opset=None, external_data="auto", verify=True)
    oracle.assert_same(run(tmp_path / "m.onnx", (q, k, v, mask)), [Plain()(q, k, v, mask)])
