"""Pooled keys: the formula by hand, the same on every backend, in models, in files, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import onnxruntime
import oracle
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Attention, Spelling, inputs
from sites import a_site, applied, refusal, wrong
from specs import run
from torch import Tensor, nn

import attnopt
from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.errors import ConversionError, PolicyError
from attnopt.ir.head_edits import TowardValues
from attnopt.ir.head_routing import Routed
from attnopt.ir.interfaces import Backend
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.pooling import parts_of
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.spec_rules import verify_spec
from attnopt.passes import (
    DynamicSparse,
    GroupedQuery,
    LocalWindow,
    PoolKeys,
    PruneHeads,
    ScaleHeads,
    Sparse,
)
from attnopt.patterns import Blocks, Causal, Full, Neighborhood, Pattern, PerHead, Window

pytestmark = pytest.mark.usefixtures("one_capture")

B, L, D, DV = 2, 4, 6, 7
SHARED = (0, 2, 1, 0, 2)  # H = 5 query heads read G = 3 K/V heads


def pools_of(p: PooledKeys, S: int) -> list[list[int]]:
    """The keys of each pool, in the order of the pools."""
    found = [[j] for j in range(p.prefix)]
    sides = p.grid or (S - p.prefix,)
    for corner in product(*(range(0, n, r) for n, r in zip(sides, p.size, strict=True))):
        tokens = product(*(range(c, c + r) for c, r in zip(corner, p.size, strict=True)))
        found.append([p.prefix + flat(token, sides) for token in tokens])
    assert sorted(j for pool in found for j in pool) == list(range(S))
    return found


def flat(token: tuple[int, ...], sides: tuple[int, ...]) -> int:
    place = 0
    for c, n in zip(token, sides, strict=True):
        place = place * n + c
    return place


def by_hand(spec: AttentionSpec, t: dict[str, Any], *, over_pools: bool) -> Tensor:
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
        outputs.append((e / total.where(total > 0, 1.0)) @ v)
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


# ---------------------------------------------------------------- in models
def means(p: PooledKeys, S: int, heads: int) -> Tensor:
    """What the oracle is told: for each head and key, the weights of the keys of its pool."""
    found = torch.eye(S).repeat(heads, 1, 1)
    for pool in pools_of(p, S):
        for h, i, j in product(p.heads, pool, pool):
            found[h, i, j] = 1 / len(pool)
    return found


def vit(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two layers of 4 heads over a class token and a grid of 4 x 4."""
    from zoo import timm_model

    torch.manual_seed(0)
    model = timm_model(name, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    return model.eval(), (torch.randn(2, 3, 32, 32),)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "eva02_tiny_patch14_224"])
def test_in_a_vision_transformer(name: str, tmp_path: Any) -> None:
    """HiLo: two heads in windows of 2 x 2, two over pools of 2 x 2; keys of the second model are rotated before."""
    model, args = vit(name)
    pools, window = PoolKeys(2, (4, 4), heads=[1, 3], prefix=1), Neighborhood((4, 4), 2, stride=2)
    seen = torch.ones(4, 17, 17, dtype=torch.bool)
    seen[::2, 1:, 1:] = window.mask(16, 16)
    for policy, visible in ((pools, None), ("hilo", seen)):
        edit = oracle.Edit(visible, pools=means(PooledKeys(2, [1, 3], (4, 4), 1), 17, 4))
        want = oracle.run_edited(model, args, None, {0: edit, 1: edit})
        oracle.assert_differs(want, oracle.run(model, args))
        if policy == "hilo":
            policy = [Sparse(f"PerHead({{(0, 2): Prefix(1, {window!r})}})"), pools]
        for backend in ("sdpa", "blocked", "reference"):
            fast = attnopt.optimize(model, policy, args, backend=backend)
            assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
            oracle.assert_same(oracle.run(fast, args), want, backend)
        fast = attnopt.optimize(
            model, policy, args, dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, backend="sdpa"
        )
        fast.export_onnx(tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        for batch in (2, 3):
            x = torch.randn(batch, 3, 32, 32)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            want = oracle.run_edited(model, (x,), None, {0: edit, 1: edit})
            oracle.assert_same([torch.from_numpy(found)], want, "ONNX Runtime")


SHARING = Spelling(heads=6, kv_heads=2, head_dim=5, value_dim=3, share="repeat_interleave", packing="fused")
LAWS = {
    "plain": (Spelling(), 7, [0, 3]),
    "shared": (SHARING, 7, [0, 1, 5]),
    "tiled": (replace(SHARING, share="tiled", packing="separate"), 1, [2, 3, 4]),
    "sinks": (Spelling(sinks=True, core="bmm"), 7, [1, 2]),
    "norm": (Spelling(norm="rms", rope="half", scale="buffer"), 7, None),
    "cross": (Spelling(cross=True), 5, [1]),
    "sdpa": (Spelling(core="sdpa", heads=6, kv_heads=3, share="enable_gqa"), 7, [0, 1, 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_it_equals_the_model_with_pooled_keys(law: str) -> None:
    """Also behind patterns, after pruning, and with gains."""
    s, size, heads = LAWS[law]
    model, given = Attention(s), inputs(s)
    S = given["memory" if s.cross else "x"].shape[1]
    pool = PooledKeys(size, range(s.heads) if heads is None else heads)
    edit = oracle.Edit(pools=means(pool, S, s.heads))
    want = oracle.run_edited(model, (), given, {0: edit}, heads=s.heads)
    assert size == 1 or oracle.distance(want, oracle.run(model, (), given)) > 1e-3
    for backend in ("auto", "blocked"):
        fast = attnopt.optimize(model, PoolKeys(size, heads=heads), (), given, backend=backend)
        (site,) = fast.report.sites
        assert not site.refusals
        oracle.assert_same(oracle.run(fast, (), given), want, backend)
    visible = None if s.cross else Window(3).mask(S, S).expand(s.heads, -1, -1)
    gains = (1.0, 0.0, *(1.0,) * (s.heads - 3), 2.0)
    edit = oracle.Edit(visible, gains, pools=edit.pools)
    want = oracle.run_edited(model, (), given, {0: edit}, heads=s.heads)
    edits = [PruneHeads(heads=[1]), ScaleHeads({s.heads - 1: 2.0}), *([] if s.cross else [LocalWindow(3)])]
    for policy in ([PoolKeys(size, heads=heads), *edits], [*edits, PoolKeys(size, heads=heads)]):
        fast = attnopt.optimize(model, policy, (), given)
        assert not fast.report.sites[0].refusals
        oracle.assert_same(oracle.run(fast, (), given), want)


def test_one_key_in_a_pool_changes_nothing() -> None:
    model, x = full()
    for p in (PoolKeys(1), PoolKeys(1, (3, 4)), PoolKeys(2, heads=[])):
        fast = attnopt.optimize(model, p, (x,))
        (site,) = fast.report.sites
        assert site.spec_before == site.spec_after
        assert site.cost_before == site.cost_after
        assert fast.sites[0].spec.pooling is None
        torch.testing.assert_close(fast(x), model(x))
    assert site.notes == ()
    assert "pool-keys: pools of one key change nothing" in str(attnopt.optimize(model, PoolKeys(1), (x,)).report)


def full() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return tiny_models.Attention(width=32, heads=4, causal=False).eval(), torch.randn(2, 12, 32)


def pooled_by_hand(model: nn.Module, x: Tensor, p: PooledKeys) -> list[Tensor]:
    return oracle.run_edited(model, (x,), None, {0: oracle.Edit(pools=means(p, x.shape[1], 4))})


def test_reports_and_costs() -> None:
    model, x = full()
    fast = attnopt.optimize(model, PoolKeys(3, heads=[1, 2]), (x,), backend="sdpa")
    (site,) = fast.report.sites
    assert site.spec_after == "4 heads, Full(), heads 1, 2 read keys pooled by 3"
    assert site.notes == ()
    projections = 4 * 2 * 32 * 32 * 12
    assert site.cost_before.flops - projections == 4 * (2 * 12 * 12 * 16)
    assert site.cost_after.flops - projections == 2 * (2 * 12 * 12 * 16) + 2 * (2 * 12 * 4 * 16)
    assert site.cost_after.parameters == site.cost_before.parameters
    assert "heads 1, 2 read keys pooled by 3" in str(fast.sites[0].spec)
    (kept,) = attnopt.optimize(model, [PoolKeys(3, heads=[1, 2]), LocalWindow(2)], (x,), backend="sdpa").report.sites
    told = "the pools of heads 1, 2 are computed key by key under a pattern, bias or mask: no time is saved"
    assert told in kept.notes
    assert kept.cost_after.flops - projections == 4 * (2 * 54 * 16)
    (plain,) = attnopt.optimize(model, PoolKeys(3), (x,), backend="reference").report.sites
    assert plain.notes == ("reference: pooled keys are computed like all others: no time is saved",)


def test_lengths_that_are_multiples(tmp_path: Any) -> None:
    model, x = full()
    pool = PooledKeys(3, [1, 3], None, 0)
    batch, count = torch.export.Dim("batch"), torch.export.Dim("pools")
    shapes = {"x": {0: batch, 1: 3 * count}}
    fast = attnopt.optimize(model, PoolKeys(3, heads=[1, 3]), (x,), dynamic_shapes=shapes, backend="sdpa")
    fast.export_onnx(tmp_path / "m.onnx")
    fast.save(tmp_path / "saved")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for length in (12, 6, 21):
        other = torch.randn(3, length, 32)
        want = pooled_by_hand(model, other, pool)
        oracle.assert_same(oracle.run(fast, (other,)), want)
        oracle.assert_same([torch.from_numpy(session.run(None, {"x": other.numpy()})[0])], want)
    again = attnopt.load(tmp_path / "saved")
    assert torch.equal(again(x), fast(x))
    assert again.sites[0].spec == fast.sites[0].spec
    assert again.sites[0].spec.pooling == pool
    assert again.sites[0].kv_step == fast.sites[0].kv_step == 3
    again.export_onnx(tmp_path / "again.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "again.onnx").run(None, {"x": x.numpy()})
    oracle.assert_same([torch.from_numpy(found)], pooled_by_hand(model, x, pool))
    for size, shapes_ in ((2, shapes), (3, "auto")):
        with pytest.warns(attnopt.AttnoptWarning, match="the policy changes nothing"):
            (site,) = attnopt.optimize(model, PoolKeys(size), (x,), dynamic_shapes=shapes_).report.sites
        assert str(site.refusals["pool-keys"]).startswith(
            f"[wrong-length] expected a multiple of {size} keys, found a dynamic number of keys"
        )


def test_a_prefix_moves_the_multiples() -> None:
    model, _ = full()
    x, p = torch.randn(2, 13, 32), PooledKeys(3, [0], None, 1)
    shapes = {"x": {1: 3 * torch.export.Dim("pools") + 1}}
    fast = attnopt.optimize(model, PoolKeys(3, heads=[0], prefix=1), (x,), dynamic_shapes=shapes)
    for length in (13, 7, 22):
        other = torch.randn(2, length, 32)
        oracle.assert_same(oracle.run(fast, (other,)), pooled_by_hand(model, other, p))


def test_steps_of_a_size() -> None:
    for length, step in ((12, 0), (6 * torch.export.Dim("a"), 6), (4 * torch.export.Dim("b") + 4, 4)):
        model, x = full()
        shapes = None if length == 12 else {"x": {1: length}}
        (site,) = attnopt.inspect(model, (x,), dynamic_shapes=shapes).sites
        assert (site.kv_len, site.kv_step, site.is_dynamic) == (12, step, step > 0)


def test_optimized_again() -> None:
    model, x = full()
    once = attnopt.optimize(model, PoolKeys(3, heads=[1, 2]), (x,), backend="sdpa")
    again = attnopt.optimize(once, "fuse", (x,))
    assert [s.num_heads for s in again.sites] == [2, 2]
    torch.testing.assert_close(again(x), once(x))


def test_merged_heads_and_calibration() -> None:
    """K/V heads merged and refitted behind pools: what is fitted is what is computed."""
    model, x = full()
    data = [torch.randn(2, 12, 32) for _ in range(8)]
    for merge in ("mean", "svd"):
        policy = [PoolKeys(3, heads=[0, 3]), GroupedQuery(kv_heads=2, merge=merge)]
        fast = attnopt.optimize(model, policy, (x,), calibration=data, backend="sdpa")
        plain = attnopt.optimize(model, policy, (x,), calibration=data, backend="reference")
        assert not fast.report.sites[0].refusals
        torch.testing.assert_close(fast(x), plain(x))
        assert fast.sites[0].spec.num_kv_heads == 2


def test_half_precision() -> None:
    model, x = full()
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    fast = attnopt.optimize(model, PoolKeys(3, heads=[1, 2]), (x,), backend="sdpa")
    got = fast(x).float()
    want = pooled_by_hand(model.float(), x.float(), PooledKeys(3, [1, 2]))
    oracle.assert_same([got], want, limit=oracle.LIMITS[torch.bfloat16])


def test_training() -> None:
    """Gradients reach the weights, as they do by hand."""
    model, x = full()
    fast = attnopt.optimize(model, PoolKeys(3, heads=[1, 2]), (x,), backend="sdpa")
    fast(x).square().sum().backward()
    got = [p.grad for p in (model.q.weight, model.k.weight, model.v.weight, model.o.weight)]
    model.zero_grad()
    with oracle.edited({0: oracle.Edit(pools=means(PooledKeys(3, [1, 2]), 12, 4))}):
        model(x).square().sum().backward()
    for a, p in zip(got, (model.q, model.k, model.v, model.o), strict=True):
        torch.testing.assert_close(a, p.weight.grad)


# ---------------------------------------------------------------- texts, and where it is refused
def test_policies() -> None:
    p = PoolKeys((2, 3), (4, 6), heads=[3, 1], prefix=1)
    assert attnopt.Policy.from_json(attnopt.Policy.of(p).to_json()) == attnopt.Policy.of(p)
    assert attnopt.Policy.of("pool-keys((2, 3), grid=(4, 6), heads=[1, 3], prefix=1)") == attnopt.Policy.of(p)
    assert attnopt.Policy.of("pool-keys(2, [4, 6])") == attnopt.Policy.of(PoolKeys((2, 2), (4, 6)))
    assert PoolKeys(2, (4, 6)).size == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "pool-keys: invalid value size=0: expected an integer from 1"),
        ({"size": (2, 2)}, "pool-keys: invalid value size=(2, 2): expected one integer or 1 of them"),
        ({"size": (2, 2, 2), "grid": (4, 4)}, "pool-keys: invalid value size=(2, 2, 2): expected one integer or 2 of"),
        ({"size": 2, "grid": (4, 0)}, "pool-keys: invalid value grid=0"),
        ({"size": 2, "prefix": -1}, "pool-keys: invalid value prefix=-1"),
        ({"size": 2, "heads": [-1]}, "pool-keys: invalid value heads=-1"),
        (
            {"size": (2, 4), "grid": (4, 6)},
            "pool-keys: grid=(4, 6) cannot be cut into pools of 2 x 4: 6 is not a multiple of 4\n"
            "  hint: use a size that divides 6 (2, 3, 6), or pad the tokens to whole pools",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        PoolKeys(**options)
    assert message in str(caught.value)


def test_texts_that_do_not_describe_pools() -> None:
    for text in ("3", "Full()", "PooledKeys(0, [1])", "PooledKeys(2, [1], size=2)"):
        with pytest.raises(PolicyError):
            PooledKeys.from_json(text)


REFUSED = {
    "heads": (PoolKeys(3, heads=[4]), {}, "[unknown-head] expected heads from 0 to 3, found head 4"),
    "length": (
        PoolKeys(5), {}, "[wrong-length] expected a multiple of 5 keys, found 12 keys (at model.py:88)\n  hint: pad the "
        "tokens to whole pools, or choose a size that divides their number",
    ),
    "class token": (
        PoolKeys(11), {}, "[wrong-length] expected a multiple of 11 keys, found 12 keys (at model.py:88)\n  hint: pad the "
        "tokens to whole pools, or choose a size that divides their number; leave a class token out of the pools with "
        "prefix=1",
    ),
    "prefix": (PoolKeys(3, prefix=1), {}, "[wrong-length] expected 1 and a multiple of 3 keys, found 12 keys"),
    "grid": (
        PoolKeys(2, (2, 6), prefix=1), {}, "[wrong-length] expected 1 and 2 x 6 keys, 13 in all, found 12 keys (at "
        "model.py:88)\n  hint: give the grid of the keys, with the number of class and register tokens before it as prefix=",
    ),
    "dynamic": (
        PoolKeys(3), {"kv_step": 1}, "[wrong-length] expected a multiple of 3 keys, found a dynamic number of keys (at "
        "model.py:88)\n  hint: remove their axis from dynamic_shapes, or make it a multiple, such as 3 * "
        'torch.export.Dim("pools")',
    ),
    "dynamic grid": (
        PoolKeys(2, (2, 6)), {"kv_step": 12}, "[wrong-length] expected 2 x 6 keys, 12 in all, found a dynamic number of "
        "keys (at model.py:88)\n  hint: remove their axis from dynamic_shapes",
    ),
    "causal": (
        PoolKeys(3), {"pattern": Causal()}, "[causal-pools] expected queries that may see later keys, found Causal() (at "
        "model.py:88)\n  hint: the mean of a pool mixes later keys into visible ones; use grouped-query or local-window",
    ),
    "causal head": (PoolKeys(3, heads=[1]), {"pattern": PerHead({1: Window(2, 0)})}, "[causal-pools]"),
    "mask": (
        PoolKeys(3), {"has_mask": True}, "[masked-pools] expected keys that are never hidden, found a mask operand (at "
        "model.py:88)\n  hint: hidden keys, such as padding, would enter the means; capture the model without padding and "
        "its mask",
    ),
    "cache": (
        PoolKeys(3), {"alignment": "last", "q_len": 2}, "[cached-keys] expected keys that are all computed in this call, "
        "found 2 queries after 10 past keys (at model.py:88)\n  hint: pools would change with every new token; capture the "
        "model without its cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_cannot_be_applied(name: str) -> None:
    p, changes, text = REFUSED[name]
    own = {k: v for k, v in changes.items() if k in ("kv_step", "alignment", "q_len")}
    site = replace(a_site(**{k: v for k, v in changes.items() if k not in own}), **own)
    assert refusal(p, site).startswith(text)


def test_where_it_can_be_applied() -> None:
    for p, site in (
        (PoolKeys(3, heads=[0]), a_site(pattern=PerHead({1: Causal()}))),
        (PoolKeys(3), a_site(is_cross=True)),
        (PoolKeys(3), replace(a_site(q_len=5), kv_step=6, alignment="none")),
        (PoolKeys((2, 3), (2, 5 + 1)), a_site(has_bias=True)),
        (PoolKeys((2, 3), (2, 3), prefix=6), a_site()),
    ):
        assert applied(p, site).spec.pooling is not None


def test_once_and_not_with_chosen_blocks() -> None:
    pooled = applied(PoolKeys(3, heads=[0]), a_site())
    text = "[already-pooled] expected an attention without pooled keys, found head 0 reads keys pooled by 3"
    assert refusal(PoolKeys(2, heads=[1]), pooled).startswith(text)
    assert refusal(DynamicSparse(), pooled).startswith(text)
    assert refusal(PoolKeys(3), applied(DynamicSparse(), a_site())).startswith("[already-selected]")
    without = applied(PruneHeads(heads=[0]), pooled)
    assert applied(PoolKeys(2, heads=[0, 1]), without).spec.pooling == PooledKeys(2, [1])


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


HIDING = [
    Spelling(mask=(kind,), apply=how)
    for kind in ("padding", "float-padding", "given")
    for how in ("add-inf", "add-min", "where", "masked_fill", "moderate")
]
SHOWING = [Spelling(bias_kind=kind) for kind in ("alibi", "table")]


@pytest.mark.parametrize("s", HIDING, ids=lambda s: f"{s.mask[0]}-{s.apply}")
def test_padding_in_every_form_is_refused(s: Spelling) -> None:
    """Also as a bias: the mean of a pool with a hidden key would not be hidden."""
    (site,) = attnopt.inspect(Attention(s), (), inputs(s)).sites
    refused = PoolKeys(7).check(site)
    assert refused is not None
    assert refused.code == "masked-pools"


@pytest.mark.parametrize("s", SHOWING, ids=lambda s: s.bias_kind)
def test_a_bias_of_positions_is_not_a_mask(s: Spelling) -> None:
    (site,) = attnopt.inspect(Attention(s), (), inputs(s)).sites
    assert site.spec.has_bias
    assert PoolKeys(7).check(site) is None


# ---------------------------------------------------------------- where no form of the model can hold it
@pytest.mark.slow
def test_a_model_class_cannot_hold_it() -> None:
    from zoo import deit

    model, args, _ = deit()
    with pytest.raises(ConversionError, match="pooled keys and values cannot be represented in this model class"):
        attnopt.convert(model, PoolKeys(2, (4, 4), prefix=2), args)


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
