"""Batch and heads on one axis: read in any spelling, with heads apart from sequences, at any batch."""

from __future__ import annotations

import copy

import merged_models as models
import pytest
import torch
import zoo
from merged_models import DECOYS, SPELLINGS, WIDTH, Merged, meant
from oracle import assert_same, run
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt.passes import LocalWindow, PruneHeads, ScaleHeads

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),
]
N = 8
AHEAD = torch.arange(N) - torch.arange(N)[:, None]
NEAR = (AHEAD >= -2) & (AHEAD <= 1)
GAINS = (0.5, -1.0, 2.0)
each = pytest.mark.parametrize(
    "kind", mostly_slow(SPELLINGS, models.Pieces, models.Behind), ids=lambda kind: kind.__name__
)


def made(kind: type[nn.Module], batch: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return zoo.loud(kind()), torch.randn(batch, N, WIDTH)


@each
@pytest.mark.parametrize("batch", mostly_slow((1, 2, 3), 2))
def test_passes_at_other_batches(kind: type[Merged], batch: int) -> None:
    """Where the batch is fixed, too, and as large as there are heads."""
    model, x = made(kind, batch)
    for shapes in (None, {"x": {0: torch.export.Dim.AUTO}}):
        others = [x] if shapes is None else [torch.randn(b, N, WIDTH) for b in (batch, 2, 5)]
        pruned = attnopt.optimize(model, PruneHeads(heads=[1]), (x,), dynamic_shapes=shapes)
        assert pruned.sites[0].spec.heads == (0, 2)
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
        windowed = attnopt.optimize(model, [ScaleHeads(GAINS), LocalWindow(2, 1)], (x,), dynamic_shapes=shapes)
        for other in others:
            assert_same(run(pruned, (other,)), [meant(model, other, (1.0, 0.0, 1.0))])
            assert_same(run(windowed, (other,)), [meant(model, other, GAINS, NEAR)])


@pytest.mark.parametrize("kind", mostly_slow(DECOYS, models.OtherOrderBehind), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("batch", mostly_slow((1, 2, 3), 2))
def test_other_orders_are_never_wrong(kind: type[Merged], batch: int) -> None:
    """Sequences that meet each other: heads are those of the queries, or nothing changes."""
    model, x = made(kind, batch)
    for shapes in (None, {"x": {0: torch.export.Dim.AUTO}}):
        for policy, gains, visible in (
            ("fuse", None, None),
            (PruneHeads(heads=[1]), (1.0, 0.0, 1.0), None),
            (ScaleHeads(GAINS), GAINS, None),
            (LocalWindow(2, 1), None, NEAR),
        ):
            fast = attnopt.optimize(model, policy, (x,), dynamic_shapes=shapes)
            edited = copy.deepcopy(model)
            if any(site.status == "rewritten" for site in fast.report.sites):
                edited.gains, edited.visible = None if gains is None else torch.tensor(gains), visible
            free = shapes is not None and not fast.report.fixed_axes
            for other in (torch.randn(b, N, WIDTH) for b in ((batch, 2, 5) if free else (batch,))):
                assert_same(run(fast, (other,)), run(edited, (other,)))


@pytest.mark.parametrize("kind", [models.WindowsInside, models.WindowsAcross])
def test_two_free_axes_merged_with_heads_are_not_told_apart(kind: type[Merged]) -> None:
    """With windows of free number; what is free stays so, and the model its own."""
    model, x = made(kind, 2)
    length = 4 * torch.export.Dim("windows", min=2, max=100)
    fast = attnopt.optimize(model, LocalWindow(1), (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO, 1: length}})
    assert [n.refusal.code for n in fast.report.near_misses] == ["unreadable-layout"]
    for size in ((5, 8), (3, 20)):
        other = torch.randn(*size, WIDTH)
        assert_same(run(fast, (other,)), [model(other)])
