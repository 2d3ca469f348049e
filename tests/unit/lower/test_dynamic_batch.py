"""Heads that are joined with a dynamic batch, as ``nn.MultiheadAttention`` joins them, can be removed and shared."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import zoo
from torch import Tensor, nn

import attnopt
from attnopt.passes import PruneHeads


def model() -> nn.TransformerEncoder:
    """Head 1 of 4 gives nothing; heads 0 and 1, and heads 2 and 3, have the same keys and values."""
    layer = nn.TransformerEncoderLayer(32, 4, 16, batch_first=True)
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for one in made.layers:
            attention: Any = one.self_attn
            attention.out_proj.weight[:, 8:16] = 0
            for start in (32, 64):  # keys, values
                for projection in (attention.in_proj_weight, attention.in_proj_bias):
                    for head in (0, 2):
                        at = start + 8 * head
                        projection[at + 8 : at + 16] = projection[at : at + 8]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["prune-heads(heads=[1])", "grouped-query(kv_heads=2)"])
def test_at_other_batches(policy: str) -> None:
    original = model()
    fast = attnopt.optimize(original, policy, torch.randn(2, 20, 32), dynamic_shapes="auto")
    assert fast.report.count("rewritten") == 2
    for batch, length in ((2, 20), (3, 9), (5, 31)):
        x = torch.randn(batch, length, 32)
        oracle.assert_same(oracle.run(fast, (x,)), oracle.run(original, (x,)), f"{batch} x {length}")


@pytest.mark.slow
def test_a_bias_whose_heads_are_joined_with_the_batch() -> None:
    """BLOOM repeats its ALiBi for the batch: heads can only be told apart further down."""
    (entry,) = (e for e in zoo.ENTRIES if e.name == "bloom")
    original, args, kwargs = entry.build()
    policy = PruneHeads(heads=[0])
    fast = attnopt.optimize(original, policy, args, kwargs, dynamic_shapes="auto")
    assert fast.report.count("rewritten") == entry.sites
    for batch in (1, 3):
        of_batch: Any = torch.utils._pytree.tree_map(_of_batch(batch), (args, kwargs))
        at_this_size = attnopt.optimize(original, policy, *of_batch)
        oracle.assert_same(oracle.run(fast, *of_batch), oracle.run(at_this_size, *of_batch), f"batch {batch}")


def _of_batch(size: int) -> Callable[[Any], Any]:
    def resized(x: Any) -> Any:
        return x[torch.arange(size) % x.shape[0]] if isinstance(x, torch.Tensor) else x

    return resized


class _GatedBias(nn.Module):
    """A bias by distance times a gate of each query and head, as in WavLM, whose batch and heads become one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.shrink = nn.Conv1d(24, 24, 3, 2)
        self.gate, self.slopes = nn.Linear(6, 1), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(x.mT).mT
        B, L, _ = x.shape
        q, k, v = (f(x).view(B, L, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        gate = self.gate(x.view(B, L, 4, 6).transpose(1, 2)).sigmoid() + 2.0
        away = (torch.arange(L)[:, None] - torch.arange(L)).abs().float()
        bias = (self.slopes[:, None, None] * away).unsqueeze(0).repeat(B, 1, 1, 1).view(B * 4, L, L)
        scores = q @ k.mT / 6**0.5 + (gate.reshape(B * 4, -1, 1) * bias).view(B, 4, L, L)
        made: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, 24))
        return made


def test_heads_beside_two_free_axes() -> None:
    model, x = _GatedBias().eval(), torch.randn(2, 15, 24)
    fast = attnopt.optimize(model, PruneHeads(heads=[1]), (x,), dynamic_shapes="auto")
    with torch.no_grad():
        model.out.weight[:, 6:12] = 0
    for other in (x, torch.randn(3, 26, 24)):
        oracle.assert_same(oracle.run(fast, (other,)), oracle.run(model, (other,)))
    assert sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in model.parameters())
