"""Rows and column sums of maps, block by block, against the whole map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.ir.operands import OperandTensors
from attnopt.ir.spec import AttentionSpec
from attnopt.observe import maps
from attnopt.patterns import Causal, PerHead, Window

PATTERNS = (Causal(), PerHead({1: Window(1, 0)}, Causal()))


@pytest.mark.parametrize("elements", [1, 60, 10_000])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 0.0, 2.0]).reshape(1, 4, 1, 1)], ids=["", "sinks"])
def test_rows_and_columns_of_the_whole_map(
    elements: int, pattern: Causal | PerHead, sinks: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first queries see no key."""
    monkeypatch.setattr(maps, "ELEMENTS", elements)
    q, (k, v) = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 2, 7, 8)
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1]).bool().expand(2, 1, 1, 7)
    spec = AttentionSpec.of(4, 2, 8, 8, scale=0.3, pattern=pattern).having(mask=mask, sinks=sinks)
    t = OperandTensors(q, k, v, None, mask, sinks)
    counted = torch.tensor([[1, 1, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 1]]).float()
    whole, rows = maps.weights(spec, t), torch.tensor([6, 1, 2])
    assert not whole[:, :, :2].any()
    each = whole * counted[:, None, :, None]
    torch.testing.assert_close(maps.weights(spec, t, rows), whole[:, :, rows])
    torch.testing.assert_close(maps.column_sums(spec, t, counted), each.sum(2))
    torch.testing.assert_close(maps.column_sums(spec, t, counted, rows), each[:, :, rows].sum(2))
    torch.testing.assert_close(maps.log_sum_exp(spec, t, rows), maps.log_sum_exp(spec, t)[:, :, rows])
    torch.testing.assert_close(maps.scores(spec, t, rows), maps.scores(spec, t)[:, :, rows])
