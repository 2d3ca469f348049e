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


def test_weights_that_a_rewrite_moved_are_not_read_where_they_were(tmp_path: Path) -> None:
    model, x = stack(2), torch.randn(2, 12, 16)
    fast = attnopt.optimize(model, {"layers.0": [PruneHeads(heads=[1])], "layers.1": []}, (x,))
    fast.save(tmp_path / "fast")
    for made in (fast, attnopt.load(tmp_path / "fast")):
        pruned, same = made.sites
        for role, projection in pruned.projections.items():
            assert (projection.weight, projection.rows, pruned.head_weight(role, 0)) == (None, None, None)
            assert projection.why is not None
            assert "attnopt.inspect" in projection.why
        (wanted,) = (s for s in attnopt.inspect(model, (x,)).sites if s.name == same.name)
        for role in ("q", "k", "v", "out"):
            found, known = same.head_weight(role, 1), wanted.head_weight(role, 1)
            assert found is not None
            assert known is not None
            assert torch.equal(found, known)
    (now, _) = attnopt.inspect(fast, (x,)).sites
    weight = now.head_weight("q", 1)  # the second that is left
    (trained, _) = attnopt.inspect(model, (x,)).sites
    kept = trained.head_weight("q", 2)
    assert weight is not None
    assert kept is not None
    assert torch.equal(weight, kept)
