"""Attention weights of some queries are the rows of the whole map, for every part of a spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from specs import a_spec, tensors
from torch import Tensor

from attnopt.backends import Reference
from attnopt.ir.activations import Activations
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.operands import OperandTensors
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.projection import Projected
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.weight_gains import Part, WeightGains
from attnopt.ir.weight_rows import logits_of, of_sequence, weight_rows
from attnopt.ir.zero_keys import ZeroKeys
from attnopt.patterns import Blocks, Causal, PerHead, Sinks, Window

L = 12
SPECS: dict[str, tuple[AttentionSpec, int]] = {
    "full": (a_spec(), L),
    "causal": (a_spec(pattern=Causal()), L),
    "past": (a_spec(pattern=Causal()), L + 5),
    "window": (a_spec(pattern=Causal() & (Window(3, 0) | Sinks(1))), L),
    "per-head": (a_spec(pattern=PerHead({0: Causal(), 2: Window(1)})), L),
    "shared": (a_spec(kv_of_head=(0, 0, 1, 1), pattern=Causal()), L),
    "operands": (a_spec(has_bias=True, has_mask=True, has_sinks=True, softcap=2.0), L),
    "zero-keys": (a_spec(pattern=Window(2), zero_keys=ZeroKeys(Window(2))), L),
    "pooled": (a_spec(pooling=PooledKeys(3, [1, 2])), L),
    "gains": (a_spec(weight_gains=WeightGains((Part(Blocks(4), (2.0, 0.5, 1.0, 3.0)),))), L),
    "selection": (a_spec(selection=DynamicBlocks("pooled", 2, block=4)), L),
    "map": (a_spec(has_map=True), L),
}


def activations(spec: AttentionSpec, S: int) -> Activations:
    batches = []
    for seed in (0, 1):
        t = tensors(spec, 2, L, S, torch.float32, seed)
        if spec.has_map:
            t["keep"], t["added"] = torch.rand(2, 1, L, 1), torch.rand(1, 4, L, S)
        batches.append(OperandTensors(**t))  # type: ignore[arg-type]
    return Activations(Projected("site", spec, {}), tuple(batches), compute=lambda *_: ())


def whole(spec: AttentionSpec, t: OperandTensors) -> Tensor:
    """[B, H, L, S]: what the attention gives for values that are the unit vectors."""
    S = t.k.shape[2]
    eye = torch.eye(S).expand(len(t.k), spec.num_kv_heads, S, S)
    attend = attention_of(Reference(), replace(spec, value_dim=S))
    return attend(t.q, t.k, eye, **t.others)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("entries", [1, 200, 10**6])
def test_blocks_are_rows_of_the_map(name: str, entries: int) -> None:
    spec, S = SPECS[name]
    now = activations(spec, S)
    seen: dict[tuple[int, int], list[int]] = {}
    for block in weight_rows(now, spec, entries):
        want = whole(spec, now.batches[block.batch])[block.sequence][:, block.rows]
        torch.testing.assert_close(block.weights, want.double(), atol=1e-6, rtol=1e-5)
        assert block.weights.numel() <= max(entries, spec.num_heads * S)
        seen.setdefault((block.batch, block.sequence), []).extend(block.rows.tolist())
        assert block.queries == L
        assert len(block.keys) == S
    for (batch, sequence), rows in seen.items():
        assert rows == now.batches[batch].real[sequence].nonzero().flatten().tolist()
    assert len(seen) == 4


@pytest.mark.parametrize("name", SPECS)
def test_the_whole_map(name: str) -> None:
    spec, S = SPECS[name]
    now = activations(spec, S)
    for got, t in zip(now.weights(spec), now.batches, strict=True):
        torch.testing.assert_close(got, whole(spec, t), atol=1e-6, rtol=1e-5)


def test_maps_have_the_precision_of_the_values() -> None:
    """Fits multiply the two."""
    spec = a_spec(pattern=Causal())
    t = tensors(spec, 1, L, L, torch.bfloat16, 0)
    now = Activations(Projected("site", spec, {}), (OperandTensors(**t),), compute=lambda *_: ())  # type: ignore[arg-type]
    (p,) = now.weights(spec)
    assert p.dtype == torch.bfloat16
    assert next(weight_rows(now, spec)).weights.dtype == torch.float64


def test_some_heads_alone() -> None:
    spec = a_spec(kv_of_head=(0, 0, 1, 1), has_bias=True)
    now = activations(spec, L)
    some = spec.keeping([1, 3])
    for block in weight_rows(now, some):
        want = whole(spec, now.batches[block.batch])[block.sequence][[1, 3]][:, block.rows]
        torch.testing.assert_close(block.weights, want.double(), atol=1e-6, rtol=1e-5)


def test_padding_has_no_rows() -> None:
    spec = a_spec(has_mask=True)
    t = tensors(spec, 2, L, L, torch.float32, 0)
    mask = torch.ones(2, 1, 1, L, dtype=torch.bool)
    mask[1, ..., :5] = False
    t["mask"] = mask
    now = Activations(Projected("site", spec, {}), (OperandTensors(**t),), compute=lambda *_: ())  # type: ignore[arg-type]
    rows = {b.sequence: (b.rows.tolist(), b.keys.tolist()) for b in weight_rows(now, spec)}
    assert rows[0] == (list(range(L)), [True] * L)
    assert rows[1] == (list(range(5, L)), [False] * 5 + [True] * (L - 5))


@pytest.mark.parametrize(
    ("hides", "hidden"), [(-10000.0, True), (torch.finfo(torch.float32).min, True), (-torch.inf, True), (-50.0, False)]
)
def test_logits_are_products_and_a_bias_may_hide(hides: float, hidden: bool) -> None:
    spec = a_spec(kv_of_head=(0, 0, 1, 1), pattern=Causal(), has_bias=True, softcap=1.0)
    t = tensors(spec, 1, L, L, torch.float32, 0)
    bias = torch.zeros(1, 1, 1, L)
    bias[..., 3] = hides
    own = of_sequence(OperandTensors(**{**t, "bias": bias}), 0)  # type: ignore[arg-type]
    logits, seen = logits_of(spec, own, torch.tensor([2, 7]))
    q, k = t["q"], t["k"]
    assert q is not None
    assert k is not None
    want = torch.stack([q[0, h, [2, 7]] @ k[0, h // 2].T for h in range(4)]) * spec.scale
    torch.testing.assert_close(logits, want.double(), atol=1e-6, rtol=1e-5)
    visible = torch.arange(L) <= torch.tensor([[2], [7]])
    visible[:, 3] &= not hidden
    assert torch.equal(seen.expand(1, 2, L)[0], visible)


def test_a_whole_map_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a column sum over 4096 tokens is a block of rows."""
    spec, long = a_spec(pattern=Causal()), 4096
    t = tensors(spec, 1, long, long, torch.float32, 0)
    now = Activations(Projected("site", spec, {}), (OperandTensors(**t),), compute=lambda *_: ())  # type: ignore[arg-type]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, fn: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = fn(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.untyped_storage().nbytes() // made.element_size())
            return made

    with Watch():
        blocks = weight_rows(now, spec, entries=1 << 18)
        for _ in range(4):
            next(blocks)
    assert largest <= 1 << 18
    assert largest < long * long // 8
