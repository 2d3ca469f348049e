"""Models with pooled keys: the same as with the means of pools in the place of keys and values, everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
from models import Attention, Spelling, inputs
from pooled import full, means, pooled_by_hand
from torch import Tensor, nn

import attnopt
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.passes import (
    GroupedQuery,
    LocalWindow,
    PoolKeys,
    PruneHeads,
    ScaleHeads,
    Sparse,
)
from attnopt.patterns import Neighborhood, Window

pytestmark = pytest.mark.usefixtures("one_capture")


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


@pytest.mark.slow
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


def test_optimized_again() -> None:
    model, x = full()
    once = attnopt.optimize(model, PoolKeys(3, heads=[1, 2]), (x,), backend="sdpa")
    again = attnopt.optimize(once, "fuse", (x,))
    assert [s.num_heads for s in again.sites] == [2, 2]
    torch.testing.assert_close(again(x), once(x))


@pytest.mark.slow
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


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 2]], ids=str)
def test_training(heads: list[int]) -> None:
    """Gradients are those of the edit by hand: of shared weights, and of rows that heads with and without pools have apart."""
    model, x = full()
    fast = attnopt.optimize(model, PoolKeys(3, heads=heads), (x,), backend="sdpa")
    fast(x).square().sum().backward()
    squares = sum(p.grad.square().sum() for p in fast.parameters() if p.grad is not None)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() >= ({"q.weight", "o.weight"} | ({"k.weight", "v.weight"} if len(heads) == 4 else set()))
    model.zero_grad()
    with oracle.edited({0: oracle.Edit(pools=means(PooledKeys(3, heads), 12, 4))}):
        model(x).square().sum().backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(squares, sum(grad.square().sum() for grad in want.values()))
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name])
