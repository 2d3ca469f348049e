"""The kernel on segments of tokens, against the mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.backends import block_gather, dispatch
from attnopt.backends.attention_operator import attention
from attnopt.backends.by_segment import sorted_by_segment
from attnopt.base.input import Input
from attnopt.ir.call_segments import CallSegments
from attnopt.ir.constant import Constant
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


FAR = (0, 1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**40, -1, -(2**31), -(2**32), 1 - 2**33)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(FAR), min_size=1, max_size=70), st.lists(st.sampled_from(FAR), min_size=1, max_size=70))
def test_ids_of_64_bits_are_told_apart(queries: list[int], keys: list[int]) -> None:
    torch.manual_seed(0)
    t = OperandTensors(torch.randn(1, 1, len(queries), 8), *(torch.randn(1, 1, len(keys), 8) for _ in "kv"))
    t = replace(t, segments=SegmentTensors(torch.tensor([queries]), torch.tensor([keys])))
    shown = torch.tensor([[i == j and i >= 0 for j in keys] for i in queries])[None, None]
    spec = AttentionSpec.of(1, 1, 8, 8, scale=0.5)
    want = reference(spec)(t.q, t.k, t.v, bias=None, mask=shown, sinks=None)
    torch.testing.assert_close(dispatch.forward(spec, t, None), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_pairs_name_numbers_that_narrow_ids_cannot_have(dtype: torch.dtype) -> None:
    pairs = SegmentTensors.table([[(3, 3), (44, 44), (300, 3)]])
    ids = torch.tensor([[3, 44, 7, 45]], dtype=dtype)
    shown = SegmentTensors(ids, ids, pairs).mask()[0, 0]
    assert shown.nonzero().tolist() == [[0, 0], [1, 1]]


def test_gaps_between_ids_have_no_rows_in_a_table() -> None:
    pairs = ((151644, 300), (300, 300))
    segments = CallSegments(Input("ids"), Input("ids"), (pairs, None))
    _, table = segments.tensors
    assert isinstance(table, Constant)
    assert table.shape == (2, 3, 3)
    ids = torch.tensor([[300, 151644, 0, -1, 301]])
    shown = segments.used([ids, table.tensor()], 5).mask()[0]
    assert shown[0].nonzero().tolist() == [[0, 0], [1, 0]]
    assert shown[1].all()


@pytest.mark.parametrize(("of_queries", "of_keys"), [((1, 5), (1, 7)), ((1, 6), (1, 1)), ((3, 6), (1, 7))])
def test_segments_of_other_lengths_are_refused(of_queries: tuple[int, int], of_keys: tuple[int, int]) -> None:
    """The kernel would read beyond them."""
    q, k = torch.randn(2, 1, 6, 8), torch.randn(2, 1, 7, 8)
    ids = (torch.zeros(sizes, dtype=torch.int64) for sizes in (of_queries, of_keys))
    with pytest.raises(ValueError, match="the segments of the"):
        attention(q, k, k, None, None, None, "Full()", [0], 1.0, None, None, None, *ids)


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
