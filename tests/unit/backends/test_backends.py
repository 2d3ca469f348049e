"""The reference follows the formula; SDPA follows the reference; both trace to plain operators."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import PATTERNS, D, a_spec, run, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.ir.interfaces import Backend
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal, Full, PerHead, Window


def by_hand(spec: AttentionSpec, t: dict[str, Any]) -> Tensor:
    """The formula in AttentionSpec's docstring, one number at a time."""
    q, k, v = t["q"].double(), t["k"].double(), t["v"].double()
    B, H, L, _ = q.shape
    S = k.shape[2]
    out = torch.zeros(B, H, L, v.shape[3], dtype=torch.float64)
    seen = spec.pattern.mask(L, S, num_heads=H).expand(H, L, S)
    for b in range(B):
        for h in range(H):
            g = spec.kv_of_head[h]
            for i in range(L):
                weights = {}
                for j in range(S):
                    if not seen[h, i, j] or (t["mask"] is not None and not t["mask"][b, 0, i, j]):
                        continue
                    s = spec.scale * float(q[b, h, i] @ k[b, g, j])
                    s = spec.softcap * math.tanh(s / spec.softcap) if spec.softcap else s
                    weights[j] = math.exp(s + (float(t["bias"][0, h, i, j]) if t["bias"] is not None else 0.0))
                total = sum(weights.values()) + (
                    math.exp(float(t["sinks"][0, h, 0, 0])) if t["sinks"] is not None else 0
                )
                for j, w in weights.items():
                    out[b, h, i] += w / total * v[b, g, j]
    return out


SPECS = st.builds(
    a_spec,
    heads=st.just(4),
    kv_of_head=st.sampled_from(
        [
            None,
            (0, 0, 0, 0),
            (0, 0, 1, 1),
            (0, 1, 0, 1),
            (1, 0, 0, 1),
            (0, 0, 0, 1),
            (3, 2, 1, 0),
            (4, 1, 2, 3),
            (0, 1, 2, 0),
        ]
    ),
    value_dim=st.sampled_from([D, 3, 16]),
    scale=st.sampled_from([D**-0.5, 1.0, 0.3]),
    pattern=st.sampled_from(PATTERNS),
    has_bias=st.booleans(),
    has_mask=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(SPECS, st.booleans(), st.sampled_from([None, 2.0]), st.integers(0, 9))
def test_reference_is_the_formula(spec: AttentionSpec, has_sinks: bool, softcap: float | None, seed: int) -> None:
    spec = replace(spec, has_sinks=has_sinks, softcap=softcap)
    t = tensors(spec, 2, 3, 4, torch.float64, seed)
    torch.testing.assert_close(run(Reference(), spec, t), by_hand(spec, t), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(
    SPECS,
    st.integers(1, 2),
    st.sampled_from([1, 3, 7, 40]),
    st.sampled_from([1, 4, 7, 33]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_sdpa_equals_reference(spec: AttentionSpec, B: int, L: int, S: int, dtype: torch.dtype, seed: int) -> None:
    t = tensors(spec, B, L, S, dtype, seed)
    assert Sdpa().check(spec) is None
    found, expected = run(Sdpa(), spec, t), run(Reference(), spec, t)
    assert found.dtype == expected.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=8 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value_dim", [D, 4])
@pytest.mark.parametrize("changes", [{}, {"has_bias": True}, {"has_mask": True}, {"has_bias": True, "has_mask": True}])
@pytest.mark.parametrize("kv_of_head", [None, (0, 0, 1, 1)])
@pytest.mark.parametrize("backend", [Reference(), Sdpa()])
def test_a_query_that_sees_nothing_gets_zeros(
    backend: Backend, kv_of_head: Any, changes: dict[str, bool], value_dim: int, dtype: torch.dtype
) -> None:
    spec = a_spec(kv_of_head=kv_of_head, value_dim=value_dim, pattern=Causal(), **changes)
    t = tensors(spec, 2, 6, 4, dtype, 0)  # the first two queries stand before the first key
    for operand in ("q", "k", "v"):
        t[operand] = t[operand].requires_grad_()  # type: ignore[union-attr]
    if t["mask"] is not None:
        t["mask"][1, :, 5] = False
    o = run(backend, spec, t)
    assert o[:, :, :2].eq(0).all()
    assert t["mask"] is None or o[1, :, 5].eq(0).all()
    assert o.isfinite().all()
    o.float().sum().backward()  # type: ignore[no-untyped-call]
    assert all(t[operand].grad.isfinite().all() for operand in ("q", "k", "v"))  # type: ignore[union-attr]


def test_reference_accumulates_half_precision_in_float32() -> None:
    t = tensors(a_spec(), 1, 5, 64, torch.bfloat16, 0)
    wide = {n: None if x is None else x.float() for n, x in t.items()}
    assert torch.equal(run(Reference(), a_spec(), t), run(Reference(), a_spec(), wide).bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softcap": 30.0}, "[no-softcap] expected scores without softcap, found softcap 30.0"),
        ({"has_sinks": True}, "[no-sinks] expected a softmax over keys alone, found sink logits beside them"),
        ({"scale": -1.0}, "[no-such-scale] expected a scale above 0, found -1.0"),
    ],
)
def test_sdpa_refuses_what_it_cannot_say(changes: dict[str, Any], message: str) -> None:
    assert str(Sdpa().check(a_spec(**changes))) == message
    assert Reference().check(a_spec(**changes)) is None


def a_site(spec: AttentionSpec, length: int) -> Site:
    return Site("", spec, {}, q_len=length, kv_len=length)


def test_costs_follow_what_is_computed() -> None:
    """Ratios of one machine's measurements; the order does not depend on how fast it is."""
    for backend in (Reference(), Sdpa(), Blocked()):
        assert backend.cost(a_site(a_spec(), 4096)) > 8 * backend.cost(a_site(a_spec(), 1024))
    window = a_spec(pattern=Window(63, 0))
    assert Blocked().cost(a_site(window, 8192)) < 3 * Blocked().cost(a_site(window, 4096)), "linear in the length"
    assert Blocked().cost(a_site(window, 8192)) < Sdpa().cost(a_site(window, 8192)) / 10
    assert Sdpa().cost(a_site(window, 8192)) < Reference().cost(a_site(window, 8192))


def test_what_a_call_costs_is_paid_once_for_a_batch() -> None:
    one = a_site(a_spec(), 32)
    for backend in (Blocked(), Sdpa()):
        assert backend.cost(one) < backend.cost(replace(one, batch=8)) < 8 * backend.cost(one)


def traced(backend: Backend, spec: AttentionSpec, dynamic: bool, L: int = 5, S: int = 5) -> tuple[Any, ShapeEnv]:
    """The backend's graph on fake tensors, as attnopt traces it; with ``dynamic``, L and S are symbols of their own."""
    t = tensors(spec, 2, L, S, torch.float32, 0)
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env if dynamic else None)

    def fake(x: Tensor | None, name: str) -> Tensor | None:
        if x is None or not dynamic:
            return None if x is None else mode.from_tensor(x)
        free = (2, 3) if name in ("bias", "mask") else (2,) if name != "sinks" else ()
        sizes = [DimDynamic.DYNAMIC if axis in free else DimDynamic.STATIC for axis in range(4)]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(x, symbolic_context=context)

    inputs = {name: fake(x, name) for name, x in t.items()}

    def attend(inputs: dict[str, Any]) -> Tensor:
        return run(backend, spec, inputs)

    with mode:
        return make_fx(attend, pre_dispatch=True)(inputs), env


def operators(graph: Any) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if n.op != "placeholder"]


def sdpa_call(graph: Any) -> Any:
    (call,) = [n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    return call


@settings(max_examples=25, deadline=None)
@given(SPECS, st.booleans(), st.sampled_from([Reference(), Sdpa()]))
def test_traces_leave_no_constants(spec: AttentionSpec, dynamic: bool, backend: Backend) -> None:
    graph, _ = traced(backend, spec, dynamic)
    assert not [n for n in graph.graph.nodes if n.op == "get_attr"]
    L, S = (9, 6) if dynamic and not spec.has_bias and not spec.has_mask else (5, 5)
    t = tensors(spec, 2, L, S, torch.float32, 1)
    torch.testing.assert_close(graph(t), run(backend, spec, t))


def test_dynamic_lengths_stay_free() -> None:
    for pattern in (Full(), Window(2), PerHead({0: Causal()})):
        spec = a_spec(pattern=pattern)
        graph, _ = traced(Reference(), spec, dynamic=True)
        t = tensors(spec, 2, 1, 11, torch.float32, 1)
        torch.testing.assert_close(graph(t), run(Reference(), spec, t))


def test_plain_attention_is_one_call() -> None:
    graph, _ = traced(Sdpa(), a_spec(), dynamic=False)
    assert operators(graph) == ["aten.scaled_dot_product_attention.default", "output"]
    graph, _ = traced(Sdpa(), a_spec(pattern=Window(4)), dynamic=False)  # covers all five keys
    assert operators(graph) == ["aten.scaled_dot_product_attention.default", "output"]


def test_square_causal_attention_needs_no_mask() -> None:
    graph, _ = traced(Sdpa(), a_spec(pattern=Causal()), dynamic=False)
    assert operators(graph) == ["aten.scaled_dot_product_attention.default", "output"]
    assert sdpa_call(graph).args[3:] == (None, 0.0, True)
    graph, _ = traced(Sdpa(), a_spec(pattern=Causal()), dynamic=False, L=3)
    assert True not in sdpa_call(graph).args
    graph, _ = traced(Sdpa(), a_spec(pattern=Causal()), dynamic=True)  # L and S are two symbols
    assert True not in sdpa_call(graph).args


@pytest.mark.parametrize(
    ("kv_of_head", "is_enabled"),
    [(None, False), ((0, 0, 1, 1), True), ((0, 0, 0, 0), True), ((0, 1, 0, 1), False), ((1, 0, 2, 3), False)],
)
def test_gqa_is_enabled_only_for_even_groups(kv_of_head: Any, is_enabled: bool) -> None:
    graph, _ = traced(Sdpa(), a_spec(kv_of_head=kv_of_head), dynamic=False)
    assert bool(sdpa_call(graph).kwargs.get("enable_gqa", False)) is is_enabled
