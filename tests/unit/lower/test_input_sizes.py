"""A projection that is replaced is not kept for its sizes."""

from __future__ import annotations

import torch
from oracle import assert_same, run
from parallel_models import Model, Style

import attnopt
from attnopt.passes import PruneHeads


def test_old_projections_go_where_positions_and_padding_read_their_lengths() -> None:
    model = Model(Style(heads=6, kv_heads=6, rope=True, padding=True, layers=1)).eval()
    ids, seen = torch.randint(0, 31, (2, 7)), torch.arange(7) < torch.tensor([[7], [5]])
    fast = attnopt.optimize(model, PruneHeads(heads=[1]), (ids, seen), dynamic_shapes="auto")
    names = {name.removeprefix("module.") for name, _ in fast.named_parameters()}
    assert not names & {"attentions.0.q.weight", "attentions.0.kv.weight"}
    with torch.no_grad():
        own = model.attentions[0].out.weight  # type: ignore[union-attr]
        own[:, own.shape[1] // 6 : 2 * (own.shape[1] // 6)] = 0.0  # type: ignore[index, operator]
    other = torch.randint(0, 31, (3, 11)), torch.arange(11) < torch.tensor([[11], [4], [9]])
    assert_same(run(fast, other), run(model, other))
