"""Windows that grow with the sequence, alone and in models of other lengths than the example's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sites import a_site, applied, refusal
from torch import Tensor, nn
from torch.export import Dim

import attnopt
from attnopt.base.ort_session import cpu_session
from attnopt.errors import ConversionError, ExportError, PolicyError
from attnopt.passes import LocalWindow, PruneHeads, Sparse
from attnopt.patterns import Causal, Pattern, PerHead, Sinks, Span, Window, parse

LENGTHS = (21, 2, 9, 24, 64, 65, 150)


@pytest.mark.parametrize(
    ("pattern", "length", "rows"),
    [
        (
            Span(0, 0, 0.25),
            8,
            ["10000000", "11000000", "11100000", "01110000", "00111000", "00011100", "00001110", "00000111"],
        ),
        (Span(1, 0, 0.5), 3, ["100", "110", "111"]),
        (Span(0, 1, 0.34, 0.0), 3, ["110", "111", "011"]),
        (Span(0, 0, 0.0, 0.5), 4, ["1110", "0111", "0011", "0001"]),
        (Span(0, 0, 0.999), 2, ["10", "11"]),
    ],
)
def test_rows_by_hand(pattern: Pattern, length: int, rows: list[str]) -> None:
    assert ["".join(str(int(x)) for x in row) for row in pattern.mask(length, length)[0]] == rows


@pytest.mark.parametrize("length", [1, 7, 8, 100, 4096])
def test_at_each_length_it_is_a_window(length: int) -> None:
    for share, plus in ((0.125, 3), (0.001, 0), (1.0, 0), (0.3, 1)):
        left = plus + int(length * round(share * 1000) // 1000)
        assert Span(plus, 2, share).density(length, length) == Window(left, 2).density(length, length)


def test_it_prints_and_is_read() -> None:
    span = Causal() & (Span(16, 0, 0.125) | Sinks(4))
    assert str(span) == "Causal() & (Span(left=16, right=0, before=0.125, after=0.0) | Sinks(4))"
    assert parse(str(span)) == span
    assert span.is_causal
    assert not Span(0, 0, 0.5, 0.5).is_causal
    assert span.look_back is None, "a cache cannot drop what a longer text will see again"


@pytest.mark.parametrize("share", [-0.1, 1.001, 0.0001, float("nan"), "half", True])
def test_shares_that_are_none(share: Any) -> None:
    for made in (lambda: Span(0, 0, share), lambda: LocalWindow(0, share=share)):
        with pytest.raises(PolicyError, match=r"invalid value (before|share)="):
            made()


def test_a_share_cannot_be_dilated() -> None:
    with pytest.raises(PolicyError, match="a share of the sequence cannot be dilated"):
        LocalWindow(4, dilation=2, share=0.5)


class Masked(nn.Module):
    """``pattern``: what its mask keeps; ``way``: how the mask is written."""

    def __init__(self, pattern: Pattern | None, way: str = "fill") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.pattern, self.way = nn.Linear(12, 36), nn.Linear(12, 12), pattern, way
        self.qkv.weight.data *= 3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = None if self.pattern is None else self.pattern.mask(x.shape[1], x.shape[1])
        if self.way == "sdpa":
            o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.5)
        elif self.way == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2
            scores = scores if seen is None else torch.where(seen, scores, -torch.inf)
            o = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        else:
            scores = q @ k.mT * 0.5
            scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
            o = scores.softmax(-1) @ v
        return self.out(o.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def optimized(causal: bool, p: Any, way: str = "fill", **options: Any) -> Any:
    model = Masked(Causal() if causal else None, way).eval()
    return attnopt.optimize(model, p, (torch.randn(2, 21, 12),), dynamic_shapes={"x": {1: Dim.DYNAMIC}}, **options)


@pytest.mark.parametrize("way", ["fill", "sdpa", "einsum"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_share_of_the_length_that_a_call_has(causal: bool, way: str) -> None:
    fast = optimized(causal, LocalWindow(1, sinks=1, share=0.125), way)
    span = Span(1, 0, 0.125) if causal else Span(1, 1, 0.125, 0.125)
    want = Masked((Causal() if causal else Span(0, 0, 1.0, 1.0)) & (span | Sinks(1)), way)
    for length in LENGTHS:
        x = torch.randn(2, length, 12)
        assert torch.allclose(fast(x), want(x), atol=1e-5), length


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_every_backend_and_after_loading(backend: str, tmp_path: Path) -> None:
    pattern = PerHead({1: Span(0, 0, 0.5) | Sinks(1), 2: Span(2, 2, 0.1, 0.3)})
    fast, want = optimized(False, Sparse(pattern), backend=backend), Masked(pattern)
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    for length in LENGTHS:
        x = torch.randn(2, length, 12)
        assert torch.allclose(fast(x), want(x), atol=1e-5), length
        assert torch.equal(loaded(x), fast(x))


@pytest.mark.parametrize("flavor", ["onnxruntime", pytest.param("standard", marks=pytest.mark.slow)])
def test_in_onnx_runtime(flavor: Any, tmp_path: Path) -> None:
    fast = optimized(True, LocalWindow(1, share=0.125))
    fast.export_onnx(tmp_path / "m.onnx", flavor=flavor)
    session = cpu_session(tmp_path / "m.onnx")
    for length in LENGTHS:
        x = torch.randn(2, length, 12)
        (got,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, fast(x).detach().numpy(), atol=1e-5)


def test_of_some_heads_after_pruning() -> None:
    both = optimized(True, [PruneHeads(heads=[0]), LocalWindow(0, share=0.5, heads=[2])])
    other = optimized(True, [LocalWindow(0, share=0.5, heads=[2]), PruneHeads(heads=[0])])
    x = torch.randn(2, 30, 12)
    assert both.sites[0].spec.pattern == Causal() & PerHead({1: Span(0, 0, 0.5)})
    assert torch.allclose(both(x), other(x), atol=1e-6)


def test_only_a_window_that_is_mirrored_grows_ahead() -> None:
    site = a_site()
    assert applied(LocalWindow(1, share=0.25), site).spec.pattern == Span(1, 1, 0.25, 0.25)
    assert applied(LocalWindow(1, 2, share=0.25), site).spec.pattern == Span(1, 2, 0.25)


def test_a_text_that_is_continued_changes_what_was_seen() -> None:
    site = replace(a_site(q_len=3), alignment="last")
    assert LocalWindow(2).check(site) is None
    assert "found 3 queries after 9 past keys" in refusal(LocalWindow(2, share=0.5), site)


def test_a_decoder_has_no_such_cache(tmp_path: Path) -> None:
    from tiny_decoder import decoder

    ids = torch.randint(0, 49, (2, 9))
    given = (ids, torch.ones_like(ids), torch.arange(9).expand(2, -1))
    fast = attnopt.optimize(decoder(), LocalWindow(2, share=0.25), given, dynamic_shapes="auto")
    with pytest.raises(ExportError, match=r"the pattern is Causal\(\) & Span\(.*supports only Causal"):
        fast.export_decoder(tmp_path / "decoder", context_length=32, eos_token_id=49)


def test_no_class_of_a_decoder_holds_it() -> None:
    from tiny_llama import tiny_llama

    model, ids = tiny_llama(2), torch.arange(12)[None]
    with pytest.raises(ConversionError, match="depends on the length of the text, which grows"):
        attnopt.convert(model, LocalWindow(1, share=0.25), (ids,))
