"""The kernel on segments of tokens, against the mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.backends import block_gather, dispatch
from attnopt.backends.by_segment import sorted_by_segment
from attnopt.ir.operands import OperandTensors, SegmentTensors
from attnopt.ir.reference import reference
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal, Full, Segments, Window

PATTERNS = (Full(), Causal(), Window(20, 3))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_implementation_equals_the_mask(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    B, H, L, S = (draw(st.integers(1, most)) for most in (3, 3, 150, 200))
    count, pattern, scattered = draw(st.integers(1, 40)), draw(st.sampled_from(PATTERNS)), draw(st.booleans())
    if pattern != Full():
        S = max(L, S)
    of_ids = 1 if draw(st.booleans()) else B
    queries, keys = (torch.randint(-1, count + 1, (of_ids, n)) for n in (L, S))
    if not scattered:
        queries, keys = queries.sort(1).values, keys.sort(1).values
    pairs = None if draw(st.booleans()) else torch.rand(draw(st.sampled_from([1, H])), count + 1, count + 1) < 0.3
    shape = draw(st.sampled_from([None, (1, H, 1, S), (B, 1, L, S), (1, H, L, 1)]))
    t = OperandTensors(
        torch.randn(B, H, L, 8),
        torch.randn(B, H, S, 8),
        torch.randn(B, H, S, 5),
        None if shape is None else torch.randn(shape),
        torch.rand(B, 1, 1, S) < 0.8 if draw(st.booleans()) else None,
        torch.randn(1, H, 1, 1) if draw(st.booleans()) else None,
        segments=SegmentTensors(queries, keys, pairs),
    )
    spec = AttentionSpec.of(H, H, 8, 5, scale=0.5, pattern=pattern).having(t.bias, t.mask, t.sinks)
    masked = t.with_segments_masked()
    want = reference(spec.having(t.bias, masked.mask, t.sinks))(
        t.q, t.k, t.v, bias=t.bias, mask=masked.mask, sinks=t.sinks
    )
    torch.testing.assert_close(dispatch.forward(spec, t, None), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block_gather.attend(spec, masked), want, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scattered_segments_of_a_pattern(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    ids = draw(st.lists(st.integers(0, 5), min_size=1, max_size=150))
    numbers = st.integers(0, 6)
    pairs = draw(st.none() | st.lists(st.tuples(numbers, numbers), max_size=9))
    pattern = Segments(ids, pairs)
    L, S = draw(st.integers(1, len(ids) + 20)), draw(st.integers(1, len(ids) + 20))
    t = OperandTensors(torch.randn(2, 2, L, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8))
    spec = AttentionSpec.of(2, 2, 8, 8, scale=0.5, pattern=pattern)
    want = reference(spec)(t.q, t.k, t.v, bias=None, mask=None, sinks=None)
    torch.testing.assert_close(dispatch.forward(spec, t, None), want, rtol=1e-4, atol=1e-5)
    tidy = sorted_by_segment(pattern)
    assert isinstance(tidy, Segments)
    assert len(tidy.ids) == len(set(ids))
    assert tidy.density(len(ids), len(ids)) == pattern.density(len(ids), len(ids))
