"""Pooled keys: the formula by hand, the same on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pooled import pools_of
from sites import wrong
from specs import run
from torch import Tensor

import attnopt
from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.errors import PolicyError
from attnopt.ir.head_edits import TowardValues
from attnopt.ir.head_routing import Routed
from attnopt.ir.interfaces import Backend
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.pooling import parts_of
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.spec_rules import verify_spec
from attnopt.ir.weight_gains import Part, WeightGains
from attnopt.passes import (
    PoolKeys,
)
from attnopt.patterns import Blocks, Full, Keys, Pattern, PerHead, Window

pytestmark = pytest.mark.usefixtures("one_capture")


B, L, D, DV = 2, 4, 6, 7
SHARED = (0, 2, 1, 0, 2)  # H = 5 query heads read G = 3 K/V heads


def by_hand(spec: AttentionSpec, t: dict[str, Any], *, over_pools: bool, gains: Tensor | None = None) -> Tensor:
    """Head by head.  ``over_pools``: a softmax over the pools; otherwise over all keys, where each of r in a pool counts 1/r."""
    S = t["k"].shape[2]
    outputs = []
    for h, head in enumerate(spec.heads):
        q, k, v = t["q"][:, h], t["k"][:, spec.kv_of_head[h]], t["v"][:, spec.kv_of_head[h]]
        pools = [[j] for j in range(S)]
        if spec.pooling is not None and head in spec.pooling.heads:
            pools = pools_of(spec.pooling, S)
        k, v = (torch.stack([sum(x[:, j] for j in pool) / len(pool) for pool in pools], 1) for x in (k, v))
        counts = torch.ones(len(pools), dtype=torch.float64)
        if not over_pools:
            of_key = [next(n for n, pool in enumerate(pools) if j in pool) for j in range(S)]
            counts = torch.tensor([1 / len(pools[n]) for n in of_key], dtype=torch.float64)
            k, v = k[:, of_key], v[:, of_key]
        s = spec.scale * torch.einsum("bld,bsd->bls", q, k)
        if spec.softcap is not None:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        if t["bias"] is not None:
            s = s + t["bias"][:, h]
        e = counts * torch.exp(s)
        if t["mask"] is not None:
            e = e * t["mask"][:, 0]
        if not over_pools:
            e = e * spec.pattern.mask(L, S, num_heads=spec.num_heads).expand(spec.num_heads, -1, -1)[h]
        total = e.sum(-1, keepdim=True)
        if t["sinks"] is not None:
            total = total + torch.exp(t["sinks"][:, h])
        p = e / total.where(total > 0, 1.0)
        outputs.append((p if gains is None else p * gains) @ v)
    return torch.stack(outputs, 1)


def tensors(spec: AttentionSpec, S: int, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    H, G = spec.num_heads, spec.num_kv_heads
    return {
        "q": random(B, H, L, spec.head_dim),
        "k": random(B, G, S, spec.head_dim),
        "v": random(B, G, S, spec.value_dim),
        "bias": random(1, H, L, S) if spec.has_bias else None,
        "mask": torch.rand((B, 1, L, S), generator=g) < 0.6 if spec.has_mask else None,
        "sinks": random(1, H, 1, 1) if spec.has_sinks else None,
    }


def lowered(backend: Backend, spec: AttentionSpec, t: dict[str, Any]) -> Tensor:
    others = {name: x for name, x in t.items() if name not in "qkv"}
    return attention_of(backend, spec)(t["q"], t["k"], t["v"], **others)


def a_spec(**changes: Any) -> AttentionSpec:
    spec = AttentionSpec.of(len(SHARED), 3, D, DV, scale=0.4, kv_of_head=SHARED)
    return replace(spec, **changes)


HEADS = st.sets(st.integers(0, 4), min_size=1).map(sorted)


SHAPES = st.sampled_from([((3,), None), ((1,), None), ((2, 3), (4, 3)), ((2, 1), (4, 3)), ((2, 3, 1), (2, 3, 2))])


POOLS = st.builds(
    lambda shape, heads, prefix: PooledKeys(shape[0], heads, shape[1], prefix), SHAPES, HEADS, st.integers(0, 2)
)


PATTERNS: list[Pattern] = [
    Full(), Full(), Window(5), PerHead({(0, 3): Blocks(4)}), PerHead({1: ~Full(), 2: Window(2)}, Full()),
]  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> tuple[AttentionSpec, dict[str, Any]]:
    pooling = draw(POOLS)
    flags = {name: draw(st.booleans()) and draw(st.booleans()) for name in ("has_bias", "has_mask", "has_sinks")}
    softcap = draw(st.sampled_from([None, None, 2.0]))
    spec = a_spec(pooling=pooling, pattern=draw(st.sampled_from(PATTERNS)), softcap=softcap, **flags)
    return spec, tensors(spec, 12 + pooling.prefix, draw(st.integers(0, 99)))


def is_bare(spec: AttentionSpec) -> bool:
    return spec.pattern == Full() and not (spec.has_bias or spec.has_mask)


@settings(deadline=None, max_examples=150)
@given(specs())
def test_the_reference_is_the_formula(made: tuple[AttentionSpec, dict[str, Any]]) -> None:
    spec, t = made
    got = run(Reference(), spec, t)
    torch.testing.assert_close(got, by_hand(spec, t, over_pools=False))
    if is_bare(spec):
        torch.testing.assert_close(got, by_hand(spec, t, over_pools=True))


@settings(deadline=None, max_examples=150)
@given(specs(), st.sampled_from([Sdpa(), Blocked()]))
def test_every_backend_follows_it(made: tuple[AttentionSpec, dict[str, Any]], backend: Backend) -> None:
    spec, t = made
    if any(backend.check(part.spec) is not None for part in parts_of(spec)):
        backend = Reference()
    torch.testing.assert_close(lowered(backend, spec, t), by_hand(spec, t, over_pools=False))


@settings(deadline=None)
@given(specs())
def test_what_is_computed(made: tuple[AttentionSpec, dict[str, Any]]) -> None:
    """Each head once, by a backend that hears nothing of pools, and over pools where nothing tells their keys apart."""
    spec, t = made
    S = t["k"].shape[2]
    assert spec.pooling is not None
    parts = parts_of(spec)
    assert sorted(place for part in parts for place in part.places) == list(range(5))
    for part in parts:
        assert part.spec.pooling is None
        for place in part.places:
            of_pools = place in spec.pooling.heads
            assert (part.pooling is not None) == of_pools
            sees_all = spec.pattern.for_head(place) == Full() and not (spec.has_bias or spec.has_mask)
            keys = len(pools_of(spec.pooling, S)) if of_pools and sees_all else S
            assert part.kv_len(S) == keys
            assert part.is_unreduced == (of_pools and not sees_all)


@settings(deadline=None)
@given(specs(), st.integers(0, 1), st.data())
def test_edits_and_routes(made: tuple[AttentionSpec, dict[str, Any]], route: int, data: st.DataObject) -> None:
    """What follows the attention reads the tokens' own values and queries, also where only the wanted rows are computed."""
    spec, t = made
    t["k"], t["v"] = t["k"][:, :, :L], t["v"][:, :, :L]
    spec = replace(
        spec, pattern=Full(), has_bias=False, has_mask=False, softcap=None,
        pooling=PooledKeys(2, data.draw(HEADS)),
    )  # fmt: skip
    t["bias"] = t["mask"] = None
    want = by_hand(spec, t, over_pools=True)
    if route:
        made_of = Routed((1,), (0, 2, 3, 4), 2)
        gates = torch.zeros(B, 5, L, 1, dtype=torch.float64)
        norms = t["q"].square().sum(-1)[:, list(made_of.routed)]
        for b, i in product(range(B), range(L)):
            best = norms[b, :, i].topk(2).indices.tolist()
            gates[b, [1, *(made_of.routed[n] for n in best)], i] = 1
        want = want * gates
        backend: Backend = replace(Blocked(), skips_rows=True)
        spec = spec.followed_by(made_of)
    else:
        own = t["v"][:, list(SHARED)]
        want[:, 3] = 0.7 * want[:, 3] + 0.3 * own[:, 3]
        backend, spec = Blocked(), spec.followed_by(TowardValues(((3, 0.3),)))
    torch.testing.assert_close(lowered(Reference(), spec, t), want)
    torch.testing.assert_close(lowered(backend, spec, t), want)


@settings(deadline=None)
@given(specs(), st.sampled_from([Reference(), Blocked()]))
def test_gains_on_weights_count_keys(made: tuple[AttentionSpec, dict[str, Any]], backend: Backend) -> None:
    """A gain of some keys of a pool leaves the others: those heads compute with every key."""
    spec, t = made
    gained = replace(spec, weight_gains=WeightGains((Part(Keys([1, 4]), (0.5,) * 5),), "none"))
    gains = torch.ones(t["k"].shape[2], dtype=torch.float64)
    gains[[1, 4]] = 0.5
    torch.testing.assert_close(lowered(backend, gained, t), by_hand(spec, t, over_pools=False, gains=gains))


def test_a_backend_is_not_given_pools() -> None:
    spec = a_spec(pooling=PooledKeys(2, [0]))
    for backend in (Sdpa(), Blocked()):
        with pytest.raises(ValueError, match="without its pooled keys"):
            backend.lower(spec)


@settings(deadline=None)
@given(POOLS, st.sampled_from([Full(), Window(3), PerHead({0: Blocks(2)})]), st.integers(0, 9))
def test_gradients(pooling: PooledKeys, pattern: Pattern, seed: int) -> None:
    spec = a_spec(pooling=pooling, pattern=pattern)
    t = tensors(spec, 12 + pooling.prefix, seed)

    def of(compute: Callable[[], Tensor]) -> list[Tensor]:
        leaves = [t[name].requires_grad_() for name in "qkv"]
        weights = torch.arange(DV, dtype=torch.float64) + 1
        return list(torch.autograd.grad((compute() * weights).sin().sum(), leaves))

    want = of(lambda: by_hand(spec, t, over_pools=False))
    assert all(bool(g.abs().max() > 1e-6) for g in want)
    for backend in (Reference(), Sdpa(), Blocked()):
        for got, g in zip(of(lambda: lowered(backend, spec, t)), want, strict=True):  # noqa: B023
            torch.testing.assert_close(got, g)


@settings(deadline=None)
@given(POOLS, st.sets(st.integers(0, 4), min_size=1))
def test_notation_and_heads(pooling: PooledKeys, kept: set[int]) -> None:
    assert PooledKeys.from_json(pooling.to_json()) == pooling
    spec = a_spec(pooling=pooling).keeping(kept)
    both = sorted(kept & set(pooling.heads))
    assert spec.pooling == (replace_heads(pooling, both) if both else None)
    assert list(verify_spec(spec, spec)) == []


def replace_heads(p: PooledKeys, heads: list[int]) -> PooledKeys:
    return PooledKeys(p.size, heads, p.grid, p.prefix)


def test_names() -> None:
    assert str(PooledKeys(2, [3, 1], (4, 6))) == "heads 1, 3 read keys pooled by 2 x 2"
    assert PoolKeys((2, 2), (4, 6)) == PoolKeys(2, [4, 6])
    assert str(a_spec(pooling=PooledKeys(3, [0]))).endswith("Full(), head 0 reads keys pooled by 3, scale 0.4")


def test_texts_that_do_not_describe_pools() -> None:
    for text in ("3", "Full()", "PooledKeys(0, [1])", "PooledKeys(2, [1], size=2)"):
        with pytest.raises(PolicyError):
            PooledKeys.from_json(text)


def test_rules_of_a_spec() -> None:
    spec = a_spec(pooling=PooledKeys(2, [1]))
    broken: list[tuple[dict[str, Any], str]] = [
        ({"pooling": wrong("by 2")}, "pooling is 'by 2', expected PooledKeys or None"),
        ({"pooling": PooledKeys(2, [7])}, "pooling names heads (7,), expected some heads of (0, 1, 2, 3, 4)"),
        ({"pooling": PooledKeys(2, [])}, "pooling names heads (), expected some heads of"),
        ({"selection": attnopt.DynamicBlocks()}, "pooling and selection: blocks of keys cannot be chosen"),
    ]
    for changes, text in broken:
        (found,) = verify_spec(spec, replace(spec, **changes))
        assert found.startswith(text)
