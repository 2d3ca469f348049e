"""Tokens routed to heads: who is chosen, what is computed, how a router is fitted, what the report says of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import tiny_models
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler
from sites import a_site, applied, refusal
from specs import a_spec, tensors
from stacks import batches, stack
from torch import Tensor, nn

import attnopt
from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.errors import AttnoptWarning, CalibrationError, PolicyError, VerificationError
from attnopt.ir.attend import Attend
from attnopt.ir.constant import Constant
from attnopt.ir.head_routing import Routed
from attnopt.ir.interfaces import Backend
from attnopt.ir.plugin_calls import attention_of
from attnopt.lower import routing_time as route_timing
from attnopt.passes import (
    DynamicSparse,
    GroupedQuery,
    HeadPatch,
    LocalWindow,
    PruneHeads,
    RouteHeads,
    ScaleHeads,
    SoftPAG,
)
from attnopt.patterns import Causal, Full, Pattern, PerHead, Sinks, Window

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def by_hand(scores_HL: list[list[float]], shared: set[int], count: int) -> Tensor:
    """Bool [H, L]; of equal scores the first head counts."""
    H, L = len(scores_HL), len(scores_HL[0])
    used = torch.zeros(H, L, dtype=torch.bool)
    for i in range(L):
        others = sorted((h for h in range(H) if h not in shared), key=lambda h: (-scores_HL[h][i], h))
        used[[*shared, *others[:count]], i] = True
    return used


def routed(backend: Backend, spec: attnopt.AttentionSpec, given_: dict[str, Any]) -> Tensor:
    t = dict(given_)
    return attention_of(backend, spec)(t.pop("q"), t.pop("k"), t.pop("v"), **t)


# ---------------------------------------------------------------- who is chosen
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.sets(st.integers(0, 3), max_size=2), st.integers(0, 3), st.booleans())
def test_gates_by_hand(seed: int, shared: set[int], count: int, tied: bool) -> None:
    others = tuple(h for h in range(4) if h not in shared)
    route = Routed(tuple(sorted(shared)), others, min(count, len(others)))
    q = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(seed))
    q = q.sign() if tied else q  # equal norms
    gates = route.gates(a_spec(), q, [])
    for b in range(2):
        scores = [[0.0] * 7] * 4 if tied else q[b].norm(dim=-1).tolist()
        assert torch.equal(gates[b], by_hand(scores, shared, route.count))


def test_nan_is_not_hidden() -> None:
    q = torch.randn(1, 4, 5, 8)
    q[0, 2, 3] = torch.nan
    assert Routed((), (0, 1, 2, 3), 1).gates(a_spec(), q, [])[0, 2, 3]


def test_a_linear_router_by_hand() -> None:
    w, q = torch.randn(4 * 5 + 1, 3), torch.randn(2, 4, 7, 5)
    route = Routed((1,), (0, 2, 3), 1, Constant.of(w))
    gates = route.gates(a_spec(), q, [w])
    for b in range(2):
        for i in range(7):
            scores = torch.cat([q[b, h, i] for h in range(4)] + [torch.ones(1)]) @ w
            assert gates[b, :, i].nonzero().flatten().tolist() == sorted([1, (0, 2, 3)[int(scores.argmax())]])


# ---------------------------------------------------------------- the law
def queries_of(model: nn.Module, name: str, head_dim: int, seen: dict[str, Tensor]) -> None:
    """Keep what the projection ``name`` gives, [B, H, L, D], whenever the model runs."""

    def hook(_: nn.Module, __: Any, out: Tensor) -> None:
        seen[name] = out.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    model.get_submodule(name).register_forward_hook(hook)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("starcoder2", Blocked(True)), ("mbart", "sdpa")])
def test_law_unrouted_heads_give_zero(name: str, backend: Any, tmp_path: Path) -> None:
    model, args, kwargs = zoo.BY_NAME[name].build()
    policy = [ScaleHeads([1, 2, 1, 1]), RouteHeads([2], routed=1), LocalWindow(4, heads=[0])]
    policy = policy[:2] if name == "mbart" else policy
    fast = attnopt.optimize(model, policy, args, kwargs, backend=backend)
    got = oracle.run(fast, args, kwargs)
    seen: dict[str, Tensor] = {}
    names = [str(s.projections["q"].weight).rpartition(".")[0] for s in attnopt.inspect(model, args, kwargs).sites]
    for n in names:
        queries_of(model, n, fast.sites[0].head_dim, seen)

    def edit(n: int, shape: tuple[int, ...]) -> oracle.Edit:
        def used() -> Tensor:
            return torch.stack([by_hand(q.norm(dim=-1).tolist(), {2}, 1) for q in seen[names[n]]])

        seen_keys = torch.ones(4, *shape[-2:], dtype=torch.bool)
        if len(policy) == 3:
            seen_keys[0] = oracle.visible(Window(4), *shape[-2:], 1)
        return oracle.Edit(seen_keys, gains=(1.0, 2.0, 1.0, 1.0), used=used)

    want = oracle.run_edited(model, args, kwargs, edit)
    oracle.assert_same(got, want)
    oracle.assert_differs(want, oracle.run(model, args, kwargs))
    fast.save(tmp_path / "saved")
    again = attnopt.load(tmp_path / "saved")
    oracle.assert_same(oracle.run(again, args, kwargs), got, limit=0.0)
    assert [s.spec for s in again.sites] == [s.spec for s in fast.sites]


def test_law_all_routed_is_exact() -> None:
    model, x = tiny_models.Stack(), torch.randn(2, 12, 16)
    for p in (RouteHeads(routed=2), RouteHeads([0], routed=1), RouteHeads([0, 1])):
        fast = attnopt.optimize(model, p, (x,))
        assert all(s.spec.after == () for s in fast.sites)
        torch.testing.assert_close(fast(x), model(x))
    spec = a_spec()
    t = tensors(spec, 2, 9, 9, torch.float64, 0)
    everything = spec.followed_by(Routed((), (0, 1, 2, 3), 4))
    assert torch.equal(routed(Reference(), everything, t), routed(Reference(), spec, t))


# ---------------------------------------------------------------- only the routed rows
PATTERNS: list[Pattern] = [Full(), Causal(), Window(3) | Sinks(1), PerHead({0: Causal(), 2: Window(9)})]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(PATTERNS), st.sampled_from([(0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1)]), st.booleans(), st.booleans(),
    st.sampled_from([(9, 9), (200, 200), (70, 131)]), st.sampled_from([(), (1,)]), st.booleans(),
)  # fmt: skip
def test_skipping_rows_follows_the_reference(
    pattern: Pattern, kv: tuple[int, ...], has_bias: bool, has_mask: bool, sizes: tuple[int, int], shared: tuple[int, ...],
    has_sinks: bool,
) -> None:  # fmt: skip
    spec = a_spec(kv_of_head=kv, pattern=pattern, has_bias=has_bias, has_mask=has_mask, has_sinks=has_sinks)
    spec = spec.followed_by(Routed(shared, tuple(h for h in range(4) if h not in shared), 1))
    t = {name: None if x is None else x.float() if x.dtype != torch.bool else x
         for name, x in tensors(spec, 2, *sizes, torch.float32, 0).items()}  # fmt: skip
    torch.testing.assert_close(routed(Blocked(True), spec, t), routed(Reference(), spec, t), rtol=2e-5, atol=2e-5)


def test_skipping_rows_computes_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.backends import dispatch, native

    rows: list[int] = []
    own = native.attend

    def counted(spec: attnopt.AttentionSpec, t: Any, order: Tensor | None) -> Tensor:
        rows.append(t.q.shape[1] * t.q.shape[2] if t.selected is None else 64 * int(t.selected.any(3).sum()))
        return own(spec, t, order)

    monkeypatch.setattr(dispatch.native, "attend", counted)
    spec = a_spec().followed_by(Routed((3,), (0, 1, 2), 1))
    t = {name: None if x is None else x.float() for name, x in tensors(spec, 1, 640, 640, torch.float32, 0).items()}
    routed(Blocked(True), spec, t)
    assert rows[0] == 640
    assert 640 <= rows[1] < 640 + 3 * 64  # of three heads' 1920 rows
    assert len(rows) == 2


def test_skipping_rows_with_selected_blocks_and_in_float64() -> None:
    from attnopt.ir.dynamic_blocks import DynamicBlocks

    spec = a_spec(selection=DynamicBlocks(keep=1, block=64), pattern=Causal()).followed_by(Routed((3,), (0, 1, 2), 1))
    for dtype in (torch.float32, torch.float64):
        t = tensors(spec, 2, 300, 300, dtype, 0)
        torch.testing.assert_close(routed(Blocked(True), spec, t), routed(Reference(), spec, t))


@pytest.mark.slow
def test_a_skipping_model_trains_runs_anywhere_and_is_exported(tmp_path: Path) -> None:
    model, x = tiny_models.Stack(), torch.randn(2, 12, 16)
    plain, fast = (
        attnopt.optimize(model, RouteHeads(routed=1), (x,), dynamic_shapes="auto", backend=b)
        for b in (Reference(), Blocked(True))
    )
    assert "attnopt.attention" in fast.graph_module.code
    for made in (plain, fast):
        made.zero_grad()
        made(x).square().sum().backward()
        model_grads = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
        if made is plain:
            want = model_grads
    assert want.keys() == model_grads.keys()
    for name, grad in want.items():
        torch.testing.assert_close(model_grads[name], grad, rtol=1e-4, atol=1e-5)
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for length in (12, 21):
        other = torch.randn(2, length, 16)
        (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), plain(other), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast(other), plain(other), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what the report says
@needs_compiler
@pytest.mark.parametrize("saves", [True, False])
def test_the_faster_form_is_taken_and_both_times_are_told(monkeypatch: pytest.MonkeyPatch, saves: bool) -> None:
    monkeypatch.setattr(route_timing, "_seconds", lambda *_: (2e-3, 1e-3 if saves else 3e-3))
    monkeypatch.setattr(route_timing, "_measured", {})
    model, x = tiny_models.Attention(), torch.randn(2, 12, 16)
    (site,) = attnopt.optimize(model, RouteHeads(routed=1), (x,)).report.sites
    if saves:
        assert site.notes[-1] == (
            "blocked computes only the routed (token, head) pairs: 1 ms of CPU time for one sequence of 12 tokens, "
            "measured on random data; computing every head would take 2 ms on sdpa"
        )
        assert site.backend == "blocked"
        assert site.cost_after.flops < site.cost_before.flops
        return
    assert site.notes[-1] == (
        "sdpa computes every head and masks those that are not routed, so no time is saved: 2 ms of CPU time for one sequence "
        "of 12 tokens, measured on random data; computing only the routed pairs would take 3 ms on blocked"
    )
    assert site.cost_after.flops == site.cost_before.flops


@pytest.mark.slow
def test_times_are_measured_once_for_equal_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    own = route_timing._seconds
    monkeypatch.setattr(route_timing, "_seconds", lambda *a: counted.append(a) or own(*a))
    monkeypatch.setattr(route_timing, "_measured", {})
    model, (x,) = tiny_models.causal()
    attnopt.optimize(model, RouteHeads(routed=1), (x,))
    assert len(counted) == 1
    assert all(seconds > 0 for seconds in own(*counted[0]))


def test_a_backend_that_masks_says_so() -> None:
    model, x = tiny_models.Attention(), torch.randn(2, 12, 16)
    (site,) = attnopt.optimize(model, RouteHeads(routed=1), (x,), backend="sdpa").report.sites
    assert site.notes == ("sdpa computes every head and masks those that are not routed: no time is saved",)


# ---------------------------------------------------------------- calibration
def test_the_linear_router_is_the_least_squares_fit() -> None:
    model, data = stack(1, causal=False), batches(12)
    fast = attnopt.optimize(model, RouteHeads([1], 1, "linear"), (data[0],), calibration=data, backend="sdpa")
    (edit,) = fast.sites[0].spec.after
    assert isinstance(edit, Routed)
    assert edit.router is not None
    layer = model.layers[0]
    x = torch.cat(data).double()
    layer = layer.double()
    with torch.no_grad():
        q, k, v = (f(x).view(len(x), 12, 4, 4).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
        o = (q @ k.mT / 2).softmax(-1) @ v
        given_ = torch.stack([o[:, h] @ layer.o.weight[:, 4 * h : 4 * h + 4].T for h in range(4)], 1).norm(dim=-1)
    held = torch.arange(len(x)) % 8 == 7
    rows = torch.cat([q.transpose(1, 2).flatten(2), torch.ones(len(x), 12, 1)], -1)
    want = torch.linalg.lstsq(
        rows[~held].flatten(0, 1), given_[~held].transpose(1, 2)[..., [0, 2, 3]].flatten(0, 1)
    ).solution

    def error(w: Tensor) -> float:
        return float((rows[held] @ w - given_[held].transpose(1, 2)[..., [0, 2, 3]]).square().mean())

    mean = torch.zeros_like(want)
    mean[-1] = given_[~held].transpose(1, 2)[..., [0, 2, 3]].flatten(0, 1).mean(0)
    assert error(edit.router.tensor().double()) <= 1.02 * error(want)
    assert error(edit.router.tensor().double()) < error(mean)
    used = edit.gates(fast.sites[0].spec, q[held].float(), [edit.router.tensor()])
    share = float(given_[held][used].sum() / given_[held].sum())
    assert f"the used heads carry {share:.1%} of the output norm" in " ".join(fast.report.sites[0].notes)


def test_shared_heads_are_those_that_give_most() -> None:
    model, data = stack(1, causal=False), batches()
    with torch.no_grad():
        model.layers[0].o.weight[:, 8:12] *= 10
    fast = attnopt.optimize(model, RouteHeads(shared=1), (data[0],), calibration=data, backend="sdpa")
    route = fast.sites[0].spec.route
    assert route is not None
    assert route.shared == (2,)
    assert route.routed == (0, 1, 3)
    with pytest.raises(CalibrationError, match="6 calibration tokens are fewer than the 16 features of the queries"):
        attnopt.optimize(model, RouteHeads(router="linear"), (data[0][:1, :6],), calibration=[data[0][:1, :6]])


# ---------------------------------------------------------------- rounding
class Wrong(Backend):
    """Ten per cent too much."""

    name = "wrong"

    def lower(self, spec: attnopt.AttentionSpec) -> Attend:
        attend: Callable[..., Tensor] = Sdpa().lower(spec)
        return lambda q, k, v, **others: 1.1 * attend(q, k, v, **others)

    def cost(self, site: attnopt.Site) -> float:
        return 0.0


def test_choices_that_rounding_turns_are_told_and_mistakes_are_not() -> None:
    model, x = nn.Sequential(*(tiny_models.Attention(16, 4, causal=False) for _ in range(3))), torch.randn(4, 32, 16)
    with torch.no_grad():
        for (
            layer
        ) in model:  # queries of equal norm, but for rounding: every head has the features of the first, in turn
            for p in layer.q.parameters():
                heads = p.view(4, 4, -1)
                heads[:] = torch.stack([heads[0].roll(h, 0) for h in range(4)])
    with pytest.warns(
        AttnoptWarning, match="3 attentions choose blocks, rows or heads from their inputs; each is correct on its own"
    ):
        attnopt.optimize(model, RouteHeads(routed=1), (x,), backend="sdpa")
    with pytest.raises(VerificationError, match=r"1: backend .wrong. .* does not compute what the spec says"):
        attnopt.optimize(model, RouteHeads(routed=1), (x,), backend=Wrong())


# ---------------------------------------------------------------- with other passes, and refusals
@pytest.mark.slow
def test_passes_in_a_row() -> None:
    model, x = tiny_models.Attention(heads=4), torch.randn(2, 12, 16)
    policy = [
        PruneHeads(heads=[1]),
        RouteHeads([0], 1),
        SoftPAG([3], 0.5),
        HeadPatch([0], torch.randn(1, 4)),
        ScaleHeads([2] * 4),
    ]
    found = [attnopt.optimize(model, policy, (x,), backend=b)(x) for b in ("reference", "sdpa", Blocked(True))]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    q, k, v = (f(x).view(2, 12, 4, 4).transpose(1, 2) for f in (model.q, model.k, model.v))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    o = scores.softmax(-1) @ v
    use_two = q[:, 2].norm(dim=-1) >= q[:, 3].norm(dim=-1)
    two, three = o[:, 2] * use_two[..., None], o[:, 3] * ~use_two[..., None]
    patch = policy[3]
    assert isinstance(patch, HeadPatch)
    assert isinstance(patch.values, Constant)
    made = [patch.values.tensor().expand(2, 12, 4), torch.zeros(2, 12, 4), two, 0.5 * three + 0.5 * v[:, 3]]
    torch.testing.assert_close(found[0], model.o(2 * torch.cat(made, -1)))


def test_what_is_refused() -> None:
    routed_ = applied(RouteHeads([0], 1), a_site())
    for p in (RouteHeads(), PruneHeads(heads=[0]), GroupedQuery(kv_heads=2)):
        assert refusal(p, routed_).startswith("[already-edited]")
    with pytest.raises(ValueError, match="prune before routing"):
        routed_.spec.keeping([0, 1, 2])
    assert applied(DynamicSparse(), routed_).spec.route == routed_.spec.route
    assert "[unknown-head]" in refusal(RouteHeads([4]), a_site())
    assert "[needs-calibration]" in refusal(RouteHeads(2), a_site())
    assert "[needs-calibration]" in refusal(RouteHeads(router="linear"), a_site())
    assert "[all-heads]" in refusal(RouteHeads([0], 0), applied(PruneHeads(heads=[0]), a_site()))
    assert applied(RouteHeads([0, 1], 1), applied(PruneHeads(heads=[0]), a_site())).spec.route == Routed(
        (1,), (2, 3), 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routed": -1}, "invalid value routed=-1"),
        ({"shared": -1}, "invalid value shared=-1"),
        ({"shared": True}, "invalid value shared=True"),
        ({"routed": 0}, "shared=() and routed=0 leave no head"),
        ({"router": "softmax"}, "invalid value router='softmax': expected one of 'query-norm', 'linear'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        RouteHeads(**options)
    assert message in str(caught.value)


def test_policies_with_routes_read_back() -> None:
    for p in (RouteHeads(2, 3, "linear"), RouteHeads([1, 0], 2)):
        policy = attnopt.Policy.of(p)
        assert attnopt.Policy.from_json(policy.to_json()) == policy
    assert (
        replace(RouteHeads([1]), routed=2) == attnopt.Policy.of("route-heads(shared=[1], routed=2)").passes_for("")[0]
    )
