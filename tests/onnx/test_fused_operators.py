"""Operators that are a whole attention: what is read is what ONNX Runtime computes, and the attention is found in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from attnopt.base.call_inputs import CallInputs
from attnopt.compiler.analyze import analyze
from attnopt.ir.site import Site
from attnopt.onnx.load.load import opened

B, L, H, G, D = 2, 7, 4, 2, 8
Arrays = dict[str, np.ndarray[Any, Any]]


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def site_of(
    path: Path, kind: str, given: Arrays, stored: Arrays, slots: list[str], outputs: int = 1, **options: Any
) -> Site:
    """The one attention in a file of one node; ``slots``: its inputs, empty where one is left out."""
    domain = options.pop("domain", "com.microsoft")
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(kind, slots, names, domain=domain, **options)
    of = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, of(x.dtype), list(x.shape)) for n, x in given.items()],
        [helper.make_tensor_value_info("y0", TensorProto.FLOAT, [None] * next(iter(given.values())).ndim)],
        [numpy_helper.from_array(x, n) for n, x in stored.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    feed = tuple(torch.from_numpy(x) for x in given.values())
    found = analyze(opened(path, feed, {}, opens_fused=True), CallInputs(feed, {}), {}).findings
    (one,) = (f.site for f in found.found)
    return one


def test_attention_with_its_projections(tmp_path: Path) -> None:
    stored = {
        "w": noise(H * D, 3 * H * D, seed=1),
        "b": noise(3 * H * D, seed=2),
    }
    site = site_of(
        tmp_path / "a.onnx",
        "Attention",
        {"x": noise(B, L, H * D)},
        stored,
        ["x", "w", "b"],
        num_heads=H,
        unidirectional=1,
    )
    assert (site.num_heads, site.head_dim) == (H, D)
    assert site.spec.is_causal


def test_multi_head_attention(tmp_path: Path) -> None:
    given = {n: noise(B, L, H * D, seed=i) for i, n in enumerate("qkv")}
    stored = {"b": noise(3 * H * D, seed=5), "r": noise(1, H, L, L, seed=6)}
    site = site_of(
        tmp_path / "a.onnx", "MultiHeadAttention", given, stored, ["q", "k", "v", "b", "", "r"], num_heads=H, scale=0.3
    )
    assert site.num_heads == H
    assert site.scale == pytest.approx(0.3)
    assert site.spec.has_bias


def test_grouped_query_attention(tmp_path: Path) -> None:
    given = {"q": noise(B, L, H * 2 * D), "k": noise(B, L, G * 2 * D, seed=1), "v": noise(B, L, G * 2 * D, seed=2)}
    angles = np.arange(16)[:, None] * 10.0 ** -np.arange(D)
    stored = {
        "lengths": np.full(B, L - 1, np.int32),
        "total": np.array(L, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    slots = ["q", "k", "v", "", "", "lengths", "total", "cos", "sin"]
    site = site_of(
        tmp_path / "a.onnx", "GroupQueryAttention", given, stored, slots, 3, num_heads=H, kv_num_heads=G, do_rotary=1,
        local_window_size=3, softcap=4.0,
    )  # fmt: skip
    assert (site.num_heads, site.num_kv_heads) == (H, G)
    assert site.spec.softcap == pytest.approx(4.0)
    seen = site.spec.visible_pattern.mask(L, L)[0]
    assert int(seen.sum(-1).max()) == 3
    assert site.spec.is_causal


def test_the_standard_attention_with_a_soft_cap(tmp_path: Path) -> None:
    given = {"q": noise(B, H, L, D), "k": noise(B, G, L, D, seed=1), "v": noise(B, G, L, D, seed=2)}
    site = site_of(
        tmp_path / "a.onnx", "Attention", given, {}, ["q", "k", "v"], domain="", is_causal=1, softcap=3.0, scale=0.2
    )
    assert (site.num_heads, site.num_kv_heads, site.spec.softcap) == (H, G, pytest.approx(3.0))
    assert site.spec.is_causal


def test_without_asking_they_are_left_to_the_runtime(tmp_path: Path) -> None:
    """A file that is rewritten in place is read without them: what is inside has no names there."""
    given = {n: noise(B, L, H * D, seed=i) for i, n in enumerate("qkv")}
    site_of(tmp_path / "a.onnx", "MultiHeadAttention", given, {}, ["q", "k", "v"], num_heads=H)
    feed = tuple(torch.from_numpy(x) for x in given.values())
    found = analyze(opened(tmp_path / "a.onnx", feed, {}), CallInputs(feed, {}), {}).findings
    assert not found.found
    assert found.near_misses


@pytest.mark.parametrize("opens_fused", [True, False])
def test_a_norm_that_optimizers_write_as_one_of_onnx(opens_fused: bool, tmp_path: Path) -> None:
    x, path = noise(B, L, D), tmp_path / "a.onnx"
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "scale"], ["y"], axis=-1, epsilon=1e-5)
    sizes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [B, L, D]) for name in "xy"]
    graph = helper.make_graph([node], "g", sizes[:1], sizes[1:], [numpy_helper.from_array(noise(D, seed=1), "scale")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    got = opened(path, (torch.from_numpy(x),), {}, opens_fused=opens_fused)(torch.from_numpy(x))
    (want,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    (only,) = got.values() if isinstance(got, dict) else (got,)
    np.testing.assert_allclose(only.detach().numpy(), want, atol=1e-5)
