"""Pooled keys in ONNX: files in place, and the calls of a graph that is exported."""

from __future__ import annotations

from typing import Any

import onnxruntime
import oracle
import pytest
import tiny_models
import torch
from pooled import full
from torch import Tensor, nn

import attnopt
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.passes import (
    LocalWindow,
    PoolKeys,
    Sparse,
)
from attnopt.patterns import Full, PerHead, Window

pytestmark = pytest.mark.usefixtures("one_capture")


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.attention = nn.Embedding(9, 32), tiny_models.Attention(32, 4, causal=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        made: Tensor = self.attention(self.tokens(input_ids)) @ self.tokens.weight.mT
        return made


@pytest.mark.slow
def test_a_decoder_cannot_cache_it(tmp_path: Any) -> None:
    ids = torch.randint(9, (2, 12))
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: 3 * torch.export.Dim("pools")}}
    for heads in ([0, 1, 2, 3], [0, 2]):
        fast = attnopt.optimize(Generator(), PoolKeys(3, heads=heads), (ids,), dynamic_shapes=shapes, backend="sdpa")
        with pytest.raises(attnopt.ExportError, match="it has pooled keys, which GroupQueryAttention does not support"):
            fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=1)
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("opset", [9, 13, 17, 23])
def test_onnx_files_in_place(opset: int, tmp_path: Any) -> None:
    """With ordinary operators, in the file's own opset; under a pattern, too."""
    from onnx_by_hand import DIM, in_runtime, plain

    file, out, x = plain(tmp_path / "m.onnx", opset=opset, sizes=(2, 8)), tmp_path / "fast.onnx", torch.randn(2, 8, DIM)
    before = list(attnopt.optimize(file, "fuse", (x,))(x).values())
    for policy in (PoolKeys(4, heads=[1]), PoolKeys(2, (2, 4)), [LocalWindow(2), PoolKeys(2, heads=[0], prefix=2)]):
        fast = attnopt.optimize(file, policy, (x,))
        fast.export_onnx(out)
        got = in_runtime(out, x)
        oracle.assert_same(got, list(fast(x).values()))
        oracle.assert_differs(got, before)


@pytest.mark.slow
def test_calls_know_their_heads(tmp_path: Any) -> None:
    """Each attention of a lowered graph with the heads that it computes, also after loading."""
    from attnopt.lower.attention_calls import attention_calls, lowered_at

    model, x = full()
    policy = [Sparse(PerHead({(0, 2): Window(2)})), PoolKeys(3, heads=[1, 2])]
    for backend in ("sdpa", "blocked"):
        fast = attnopt.optimize(model, policy, (x,), backend=backend)
        fast.save(tmp_path / backend)
        for m in (fast, attnopt.load(tmp_path / backend)):
            computed = [lowered_at(call) for call in attention_calls(m.graph_module.graph)]
            assert [(c.spec.heads, c.spec.pattern, c.spec.pooling) for c in computed if c is not None] == [
                ((0, 3), PerHead({0: Window(2)}), None),
                ((1,), Full(), PooledKeys(3, [1])),
                ((2,), Window(2), PooledKeys(3, [2])),
            ]
        fast.export_onnx(tmp_path / "m.onnx")
        (got,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
        oracle.assert_same([torch.from_numpy(got)], oracle.run(fast, (x,)))
