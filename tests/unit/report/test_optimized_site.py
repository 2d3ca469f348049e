"""The sites of an optimized model tell their fate, as those of its report do."""

from __future__ import annotations

from pathlib import Path

import torch
from stacks import stack

import attnopt
from attnopt.passes import GroupedQuery, PruneHeads


def test_every_fate_is_told(tmp_path: Path) -> None:
    policy = {"layers.0": [PruneHeads(heads=[1])], "layers.1": [], "layers.2": [GroupedQuery(kv_heads=3)]}
    fast = attnopt.optimize(stack(3), policy, (torch.randn(2, 12, 16),))
    fast.save(tmp_path / "fast")
    for model in (fast, attnopt.load(tmp_path / "fast")):
        assert [s.status for s in model.sites] == ["rewritten", "unchanged", "refused"]
        assert list(model.sites[2].refusals) == ["grouped-query"]
        assert [s.name for s in model.sites] == [e.name for e in model.report.sites]
        first, second, _ = model.sites
        assert first.num_heads == 3
        assert first.error is not None
        assert first.cost_after.parameters < first.cost_before.parameters
        assert second.cost_after == second.cost_before
