"""Keys of other tokens: what they mean, head by head, and that every backend computes it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import PATTERNS, a_spec, tensors
from torch import Tensor

from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.ir.constant import Constant
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.extended_keys import ExtendedKeys, MoreKeys
from attnopt.ir.interfaces import Backend
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.spec_rules import verify_spec
from attnopt.ir.weight_gains import Part, WeightGains
from attnopt.ir.zero_keys import ZeroKeys
from attnopt.passes import PoolKeys
from attnopt.patterns import Blocks, Causal, Full, Keys, Pattern

BACKENDS: list[Backend] = [Reference(), Blocked(), Sdpa()]


def by_hand(spec: AttentionSpec, t: dict[str, Tensor | None], more: MoreKeys) -> Tensor:
    """Query by query, over a list of visible keys."""
    q, k, v, ext = t["q"], t["k"], t["v"], spec.extension
    assert ext is not None
    assert q is not None
    assert k is not None
    assert v is not None
    B, H, L, _ = q.shape
    seen = spec.pattern.mask(L, k.shape[2], num_heads=H).expand(H, -1, -1)
    o = torch.zeros(B, H, L, v.shape[3], dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            g = spec.kv_of_head[h]
            for i in range(L):
                scores, values = list[float](), list[Tensor]()
                for j in range(k.shape[2]):
                    mask, bias = t["mask"], t["bias"]
                    if not seen[h, i, j] or (mask is not None and not mask[b, 0, i, j]):
                        continue
                    scores.append(
                        _score(spec, q[b, h, i], k[b, g, j]) + (0 if bias is None else float(bias[0, h, i, j]))
                    )
                    values.append(v[b, g, j])
                for m in range(more.k.shape[2]) if spec.heads[h] in ext.heads else ():
                    at = b if len(more.k) > 1 else 0
                    if more.seen is not None and not more.seen[b if len(more.seen) > 1 else 0, m]:
                        continue
                    scores.append(_score(spec, q[b, h, i], more.k[at, g, m]) + math.log(ext.weight))
                    values.append(more.v[at, g, m])
                if not values:
                    continue
                if t["sinks"] is not None:
                    scores.append(float(t["sinks"][0, h, 0, 0]))
                    values.append(torch.zeros_like(values[0]))
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                o[b, h, i] = (weights[:, None] * torch.stack(values).double()).sum(0).to(o.dtype)
    return o


def _score(spec: AttentionSpec, q: Tensor, k: Tensor) -> float:
    s = spec.scale * float(q.double() @ k.double())
    return s if spec.softcap is None else spec.softcap * math.tanh(s / spec.softcap)


def others(
    spec: AttentionSpec, M: int, batch: int, seed: int, mask: bool = False, dtype: torch.dtype = torch.float64
) -> MoreKeys:
    random = torch.Generator().manual_seed(seed)
    k, v = (
        torch.randn(batch, spec.num_kv_heads, M, d, generator=random).to(dtype) for d in (spec.head_dim, spec.value_dim)
    )
    return MoreKeys(k, v, torch.rand(batch, M, generator=random) < 0.6 if mask else None)


def attended(backend: Backend, spec: AttentionSpec, t: dict[str, Any], more: MoreKeys) -> Tensor:
    return attention_of(backend, spec, more=more)(
        t["q"], t["k"], t["v"], bias=t["bias"], mask=t["mask"], sinks=t["sinks"]
    )


EXTENSION = ExtendedKeys(Constant.of(torch.ones(3, 2)), 3, (0, 1, 2, 3))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"kv_of_head": (0, 1, 1, 0)},
    "bias": {"has_bias": True},
    "mask": {"has_mask": True},
    "all": {"has_bias": True, "has_mask": True, "has_sinks": True, "softcap": 1.5},
    "sinks": {"has_sinks": True},
    "softcap": {"softcap": 2.0},
}


@settings(max_examples=60)
@given(
    st.sampled_from(PATTERNS), st.sampled_from(list(KINDS)), st.sampled_from([1.0, 0.3, 3.0]),
    st.sampled_from([(0, 1, 2, 3), (2,), (0, 3)]), st.booleans(), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_every_backend_computes_it(
    pattern: Pattern, kind: str, weight: float, heads: tuple[int, ...], mask: bool, batch: int, seed: int
) -> None:
    ext = replace(EXTENSION, weight=weight, heads=heads, mask=Constant.of(torch.ones(3)) if mask else None)
    spec = a_spec(**{"kv_of_head": None, **KINDS[kind]}, pattern=pattern, extension=ext)
    t = tensors(spec, 2, 4, 6, torch.float64, seed)
    more = others(spec, 3, batch if batch == 2 else 1, seed, mask)
    want = by_hand(spec, t, more)
    for backend in BACKENDS:
        if backend.check(spec if backend.extends else replace(spec, extension=None)) is None:
            torch.testing.assert_close(attended(backend, spec, t, more), want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_kernel(kind: str, dtype: torch.dtype) -> None:
    """In more than one block of queries, of own and of other keys."""
    ext = replace(EXTENSION, tokens=70, weight=0.5, mask=Constant.of(torch.ones(70)), heads=(0, 2))
    spec = a_spec(**{"kv_of_head": None, **KINDS[kind]}, pattern=Causal(), extension=ext)
    t = tensors(spec, 2, 90, 90, dtype, 0)
    more = others(spec, 70, 2, 1, mask=True, dtype=dtype)
    want = attended(Reference(), spec, t, more)
    limit = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attended(Blocked(), spec, t, more), want, atol=limit, rtol=limit)


def test_large_scores_are_kept_apart() -> None:
    """Beside own scores of -1e9, or other scores far above."""
    spec = a_spec(has_bias=True, extension=EXTENSION, pattern=Causal())
    t = tensors(spec, 2, 4, 6, torch.float32, 0)
    more = others(spec, 3, 1, 0, dtype=torch.float32)
    for by in (-1e9, 1e9):
        t["bias"] = torch.full((1, 4, 4, 6), by)
        want = attended(Reference(), spec, t, more)
        torch.testing.assert_close(attended(Blocked(), spec, t, more), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("pattern", [Full(), Causal()], ids=str)
def test_a_weight_is_a_number_of_copies(backend: Backend, pattern: Pattern) -> None:
    spec = a_spec(kv_of_head=(0, 0, 1, 1), pattern=pattern, extension=replace(EXTENSION, weight=4.0))
    t, more = tensors(spec, 2, 5, 5, torch.float64, 0), others(spec, 3, 1, 0)
    copies = MoreKeys(more.k.repeat(1, 1, 4, 1), more.v.repeat(1, 1, 4, 1))
    one = replace(spec, extension=replace(EXTENSION, tokens=12))
    torch.testing.assert_close(attended(backend, spec, t, more), attended(backend, one, t, copies))


def test_zero_keys_beside_them() -> None:
    spec = a_spec(pattern=Blocks(4, 1), zero_keys=ZeroKeys(Blocks(4, 1)), extension=EXTENSION)
    t, more = tensors(spec, 2, 8, 8, torch.float64, 0), others(spec, 3, 1, 0)
    torch.testing.assert_close(attended(Blocked(), spec, t, more), attended(Reference(), spec, t, more))


def test_blocks_are_chosen_among_own_keys() -> None:
    chosen = DynamicBlocks(keep=0.5, block=64)
    spec = a_spec(selection=chosen, extension=EXTENSION)
    t, more = tensors(spec, 1, 256, 256, torch.float64, 0), others(spec, 3, 1, 0)
    want = attended(Reference(), spec, t, more)
    assert not torch.allclose(want, attended(Reference(), replace(spec, selection=None), t, more))
    for backend in (Blocked(), Sdpa()):
        torch.testing.assert_close(attended(backend, spec, t, more), want)


@pytest.mark.parametrize("pattern", [Full(), Causal()], ids=str)
def test_gradients(pattern: Pattern) -> None:
    spec = a_spec(
        kv_of_head=(0, 0, 1, 1),
        pattern=pattern,
        extension=replace(EXTENSION, weight=2.0, mask=Constant.of(torch.ones(3))),
    )
    t, more = tensors(spec, 2, 5, 5, torch.float64, 0), others(spec, 3, 2, 0, mask=True)
    found = []
    for backend in (Reference(), Blocked()):
        leaves = [
            x.detach().clone().requires_grad_() for x in (t["q"], t["k"], t["v"], more.k, more.v) if x is not None
        ]
        q, k, v, k_more, v_more = leaves
        o = attended(backend, spec, {**t, "q": q, "k": k, "v": v}, MoreKeys(k_more, v_more, more.seen))
        (o * torch.arange(o.numel(), dtype=o.dtype).reshape(o.shape).cos()).sum().backward()
        found.append([x.grad for x in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert a is not None
        assert bool(a.any())


def test_heads_that_remain() -> None:
    spec = a_spec(extension=replace(EXTENSION, heads=(1, 3)))
    kept = spec.keeping([0, 3]).extension
    assert kept is not None
    assert kept.heads == (3,)
    assert spec.keeping([0, 2]).extension is None


def test_texts() -> None:
    spec = a_spec(extension=EXTENSION)
    assert "heads 0, 1, 2, 3 read 3 more keys" in str(spec)
    one = replace(EXTENSION, heads=(1,), tokens=1, weight=0.5, mask=Constant.of(torch.ones(1)))
    assert str(one) == "head 1 reads 1 more key with weight 0.5 under a mask"
    for ext in (EXTENSION, one):
        assert ExtendedKeys.from_json(ext.to_json()) == ext


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"extension": 3}, "extension is 3, expected ExtendedKeys or None"),
    "heads": ({"extension": replace(EXTENSION, heads=(9,))}, "extension names heads (9,), expected some heads of"),
    "no heads": ({"extension": replace(EXTENSION, heads=())}, "extension names heads (), expected some heads of"),
    "weight": ({"extension": replace(EXTENSION, weight=0.0)}, "extension has weight 0.0, expected a finite number above 0"),
    "pools": (
        {"extension": EXTENSION, "pooling": PoolKeys(3)._pools([1])},
        "extension and pooling: the keys of other tokens are not pooled",
    ),
    "gains": (
        {"extension": EXTENSION, "weight_gains": WeightGains((Part(Keys([0]), (0.5,) * 4),), "logits")},
        "extension and weight_gains: their parts do not say where the keys of other tokens belong",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", list(BROKEN))
def test_specs_of_third_parties(broken: str) -> None:
    changes, told = BROKEN[broken]
    assert any(told in found for found in verify_spec(a_spec(), a_spec(**changes)))
    assert not list(verify_spec(a_spec(), a_spec(extension=EXTENSION)))


def test_a_backend_is_not_given_it_unasked() -> None:
    with pytest.raises(ValueError, match="lower the spec without its keys of other tokens"):
        Sdpa().lower(a_spec(extension=EXTENSION))
