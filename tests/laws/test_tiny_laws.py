"""The laws of ``test_laws`` on two tiny models: what one runs while one writes."""

from __future__ import annotations

import oracle
import pytest
import torch
import zoo
from models import Attention, Spelling
from test_laws import (
    Subject,
    test_law_a_long_window_changes_nothing,
    test_law_as_many_groups_as_heads_changes_nothing,
    test_law_fuse_changes_nothing,
    test_law_gains_scale_head_outputs,
    test_law_passes_compose,
    test_law_pruning_zeroes_heads_and_removes_their_weights,
    test_law_sparse_is_its_mask,
)
from torch import nn

__all__ = [
    "test_law_a_long_window_changes_nothing",
    "test_law_as_many_groups_as_heads_changes_nothing",
    "test_law_fuse_changes_nothing",
    "test_law_gains_scale_head_outputs",
    "test_law_passes_compose",
    "test_law_pruning_zeroes_heads_and_removes_their_weights",
    "test_law_sparse_is_its_mask",
]

pytestmark = pytest.mark.usefixtures("one_capture")
SPELLINGS = {
    "packed": Spelling(packing="fused", residual=True, mask=("causal",)),
    "grouped": Spelling(kv_heads=2, residual=True, rope="half"),
}


def stack(s: Spelling) -> zoo.Built:
    x = torch.randn(2, 7, s.width, generator=torch.Generator().manual_seed(7))
    return nn.Sequential(*(Attention(s, seed=i) for i in range(2))).eval(), (x,), {}


@pytest.fixture(scope="module", params=SPELLINGS)
def subject(request: pytest.FixtureRequest) -> Subject:
    s = SPELLINGS[request.param]
    entry = zoo.Entry(request.param, lambda: stack(s), 2, s.heads, s.kv_heads)
    model, args, kwargs = entry.build()
    return Subject(entry, model, args, kwargs, oracle.run(model, args, kwargs))
