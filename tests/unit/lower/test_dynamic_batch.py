"""Heads that are joined with a dynamic batch, as ``nn.MultiheadAttention`` joins them, can be removed and shared."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import zoo
from torch import nn

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
