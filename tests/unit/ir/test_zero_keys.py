"""Zero-padded windows: the same as attention over keys and values that are padded with zeros, and refused elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Attention, Spelling, inputs
from needs import needs_compiler
from sites import a_site, applied, refusal
from specs import a_spec, tensors
from torch import Tensor, nn
from torch.export import Dim
from variants import mostly_slow

import attnopt
from attnopt import recipes
from attnopt.backends import Blocked, Reference, Sdpa, block_gather, flex, native
from attnopt.errors import PolicyError
from attnopt.ir.interfaces import Backend
from attnopt.ir.operands import OperandTensors
from attnopt.ir.plugin_calls import accepts, attention_of
from attnopt.ir.site import Site
from attnopt.ir.spec_rules import verify_spec
from attnopt.ir.weight_gains import Part, WeightGains
from attnopt.ir.zero_keys import ZeroKeys
from attnopt.passes import LocalWindow, PoolKeys, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Blocks, Causal, Full, Keys, Neighborhood, Pattern, PerHead, Prefix, Window

BACKENDS: list[Backend] = [Reference(), Blocked()]


# ---------------------------------------------------------------- the definition
def window_of(p: Pattern, i: int, length: int) -> list[tuple[int, ...] | int]:
    """The places that the query at position i looks at, those beyond the edges included: coordinates of a grid, or positions."""
    match p:
        case Blocks(size, halo, shift):
            first = (i - shift) // size * size + shift - halo
            return list(range(first, first + size + 2 * halo))
        case Window(left, right):
            return list(range(i - left, i + right + 1))
        case Full():
            return list(range(length))
        case Prefix(n, rest):
            if i < n:
                return list(range(length))
            assert isinstance(rest, (Blocks, Window))
            return [*range(n), *(j + n if j >= 0 else j for j in window_of(rest, i - n, length - n))]  # type: ignore[operator]
        case Neighborhood(grid=grid):
            c = [i // step % n for step, n in zip(steps(grid), grid, strict=True)]
            lines = []
            for axis in range(len(grid)):
                s, k, d = p.stride[axis], p.kernel[axis], p.dilation[axis]
                first = c[axis] // d // s * s + s // 2 - k // 2
                lines.append([c[axis] % d + d * place for place in range(first, first + k)])
            return list(itertools.product(*lines))
    raise AssertionError(p)


def steps(grid: tuple[int, ...]) -> list[int]:
    return [torch.Size(grid[axis + 1 :]).numel() for axis in range(len(grid))]


def place_of(p: Pattern, place: tuple[int, ...] | int) -> int:
    """The position in the sequence; -1 beyond the edges of a grid."""
    if isinstance(place, int):
        return place
    assert isinstance(p, Neighborhood)
    inside = all(0 <= c < n for c, n in zip(place, p.grid, strict=True))
    return sum(c * step for c, step in zip(place, steps(p.grid), strict=True)) if inside else -1


def padded(
    p: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores_of: Callable[[Tensor], Tensor],
    shown: Tensor,
    sink: float | None,
) -> Tensor:
    """One head: [L, D], [S, D], [S, Dv] -> [L, Dv], query by query over explicit zeros.  ``shown`` [L, S]: of real keys."""
    out = []
    for row in range(len(q)):
        keys, values, seen = [], [], []
        for place in window_of(p, row + len(k) - len(q), len(k)):
            at = place_of(p, place)
            is_real = 0 <= at < len(k)
            keys.append(k[at] if is_real else torch.zeros_like(k[0]))
            values.append(v[at] if is_real else torch.zeros_like(v[0]))
            seen.append(bool(shown[row, at]) if is_real else True)
        s = scores_of(torch.stack(keys) @ q[row]).masked_fill(~torch.tensor(seen), -torch.inf)
        s = torch.cat([s, s.new_tensor([-torch.inf if sink is None else sink])])
        out.append(s.softmax(0).nan_to_num(0.0)[:-1] @ torch.stack(values))
    return torch.stack(out)


LINES = st.one_of(
    st.builds(Blocks, st.integers(1, 5), st.integers(0, 7)),
    st.builds(Blocks, st.just(4), st.integers(0, 3), st.integers(0, 3)),
    st.builds(Window, st.integers(0, 9), st.integers(0, 9)),
    st.just(Full()),
    st.builds(Prefix, st.integers(0, 2), st.builds(Blocks, st.integers(1, 4), st.integers(0, 3))),
)


@st.composite
def grids(draw: st.DrawFn) -> Neighborhood:
    grid = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    kernel = [draw(st.integers(1, 7)) for _ in grid]
    stride = [draw(st.integers(1, k)) for k in kernel]
    return Neighborhood(grid, kernel, stride, [draw(st.integers(1, 3)) for _ in grid], edge="clip")


@given(LINES | grids(), st.integers(1, 14), st.integers(1, 14))
def test_zero_keys_are_those_beyond_the_edges(p: Pattern, q_len: int, kv_len: int) -> None:
    if p.lengths is not None:
        kv_len = p.lengths.start
    q_len = min(q_len, kv_len)
    seen = p.mask(q_len, kv_len)[0].sum(1)
    want = [len(window_of(p, i + kv_len - q_len, kv_len)) - int(n) for i, n in enumerate(seen)]
    logits = ZeroKeys(p).logits(q_len, kv_len, 3, torch.empty(0, dtype=torch.float64))
    assert logits.shape == (1, 1, q_len, 1)
    assert logits.exp().round().flatten().tolist() == want


def test_heads_have_windows_of_their_own() -> None:
    p = PerHead({0: Blocks(4, 1), 2: Window(2, 1)})
    logits = ZeroKeys(p).logits(5, 6, 4, torch.empty(0))
    assert logits.shape == (1, 4, 5, 1)
    assert logits.exp().round()[0, :, :, 0].tolist() == [
        [1, 1, 1, 3, 3], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert torch.equal(ZeroKeys(p).keeping([2, 0]).logits(5, 6, 2, torch.empty(0)), logits[:, [2, 0]])


# ---------------------------------------------------------------- backends
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@settings(max_examples=40, deadline=None)
@given(
    p=st.sampled_from(
        [
            Blocks(3, 2), Window(2, 4), Neighborhood((3, 4), (5, 3), (2, 3), edge="clip"), Prefix(1, Blocks(4, 1)),
            PerHead({0: Blocks(5, 9), (1, 3): Window(1)}),
        ]
    ),
    kv_of_head=st.sampled_from([(0, 1, 2, 3), (0, 0, 1, 1), (1, 0, 0, 0)]),
    has_mask=st.booleans(), has_sinks=st.booleans(), softcap=st.sampled_from([None, 1.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]), q_len=st.sampled_from([12, 5]), seed=st.integers(0, 9),
)  # fmt: skip
def test_backends_pad_with_zeros(
    backend: Backend, p: Pattern, kv_of_head: tuple[int, ...], has_mask: bool, has_sinks: bool, softcap: float | None,
    dtype: torch.dtype, q_len: int, seed: int,
) -> None:  # fmt: skip
    spec = a_spec(4, kv_of_head, pattern=p, zero_keys=ZeroKeys(p), softcap=softcap, scale=0.7)
    spec = replace(spec, has_mask=has_mask, has_sinks=has_sinks)
    t: dict[str, Any] = tensors(spec, 2, q_len, 12, dtype, seed)

    def scores_of(products: Tensor) -> Tensor:
        s = 0.7 * products
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    want = torch.zeros(2, 4, q_len, spec.value_dim, dtype=torch.float64)
    for b, h in itertools.product(range(2), range(4)):
        g = kv_of_head[h]
        shown = torch.ones(q_len, 12, dtype=torch.bool) if t["mask"] is None else t["mask"][b, 0]
        q, k, v = t["q"][b, h].double(), t["k"][b, g].double(), t["v"][b, g].double()
        sink = float(t["sinks"][0, h]) if has_sinks else None
        want[b, h] = padded(p.for_head(h), q, k, v, scores_of, shown, sink)
    got = attention_of(backend, spec)(t.pop("q"), t.pop("k"), t.pop("v"), **t)
    assert torch.allclose(got.double(), want, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # that is what is wanted here
@pytest.mark.parametrize(
    "way", [block_gather, flex, pytest.param(native, marks=needs_compiler)], ids=lambda way: way.__name__
)
def test_kernels_take_sinks_of_rows(way: ModuleType) -> None:
    """Also in rows that see nothing but zero keys, or nothing at all."""
    p = Blocks(70, 20)
    spec = a_spec(4, pattern=p, has_mask=True)
    t: dict[str, Any] = tensors(spec, 2, 200, 200, torch.float32, 0)
    t["mask"][:, :, [0, 100, 199]] = False
    want = attention_of(Reference(), replace(spec, zero_keys=ZeroKeys(p)))(
        t["q"], t["k"], t["v"], bias=None, mask=t["mask"], sinks=None
    )
    sinks = ZeroKeys(p).logits(200, 200, 4, t["q"])
    made = way.attend(replace(spec, has_sinks=True), OperandTensors(**{**t, "sinks": sinks}))
    o = made[0] if isinstance(made, tuple) else made
    assert torch.allclose(o, want, atol=1e-5)
    assert not o[:, :, [0, 100, 199]].any()


# ---------------------------------------------------------------- models
class Attending(nn.Module):
    def __init__(self, kv_heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 4 * n) for n in (4, kv_heads, kv_heads, 4))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))
        made: Tensor = self.out(((q @ k.mT * 0.8).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made

    def meant(self, x: Tensor, p: Pattern, gains: tuple[float, ...] = (1.0,) * 4) -> Tensor:
        """With windows of ``p`` over explicit zeros."""
        q, k, v = self.heads(x)
        k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))
        shown, length = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), range(len(x))
        o = [
            [
                gains[h] * padded(p.for_head(h), q[b, h], k[b, h], v[b, h], lambda s: 0.8 * s, shown, None)
                for h in range(4)
            ]
            for b in length
        ]
        made: Tensor = self.out(torch.stack([torch.stack(heads) for heads in o]).transpose(1, 2).flatten(2))
        return made


def near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=2e-5))


CASES: list[Pattern] = [
    Blocks(4, 3), Blocks(3, 8), Window(2, 4), Neighborhood((3, 4), (5, 4), (3, 2), edge="clip"),
    recipes.halonet((3, 4), 2, 1), Prefix(1, Blocks(5, 1)), PerHead({1: Blocks(4, 1), 3: Window(9, 0)}),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference", "blocked"])
@pytest.mark.parametrize("p", CASES, ids=str)
def test_sparse_pads_with_zeros(p: Pattern, backend: str) -> None:
    model, x = Attending(), torch.randn(2, 12, 16)
    fast = attnopt.optimize(model, Sparse(p, zero_pad=True), (x,), backend=backend)
    assert near(fast(x), model.meant(x, p))
    assert not near(model.meant(x, p), attnopt.optimize(model, Sparse(p), (x,))(x))
    assert str(ZeroKeys(p)) in str(fast.report.to_json())


@pytest.mark.parametrize("p", [Blocks(4, 3), Window(2, 70), Prefix(2, Blocks(64, 3))], ids=str)
def test_dynamic_lengths(p: Pattern, tmp_path: Path) -> None:
    model, x = Attending(2).eval(), torch.randn(2, 12, 16)
    fast = attnopt.optimize(
        model, Sparse(p, zero_pad=True), (x,), dynamic_shapes={"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    )
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert loaded.sites[0].spec == fast.sites[0].spec
    for length in (2, 5, 13, 66):
        other = torch.randn(1, length, 16)
        want = model.meant(other, p)
        assert near(fast(other), want)
        assert near(loaded(other), want)


@pytest.mark.parametrize("p", CASES, ids=str)
@pytest.mark.parametrize("flavor", mostly_slow(["onnxruntime", "standard"], "onnxruntime"))
def test_onnx(p: Pattern, flavor: Any, tmp_path: Path) -> None:
    import onnxruntime

    model, x = Attending(2).eval(), torch.randn(2, 12, 16)
    shapes = None if p.lengths else {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    fast = attnopt.optimize(model, Sparse(p, zero_pad=True), (x,), dynamic_shapes=shapes)
    fast.export_onnx(tmp_path / "m.onnx", flavor=flavor)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for other in (x, *(() if shapes is None else (torch.randn(1, 31, 16), torch.randn(3, 2, 16)))):
        (made,) = session.run(None, {"x": other.numpy()})
        assert near(torch.from_numpy(made), model.meant(other, p))


def test_onnx_beside_the_sinks_of_a_model(tmp_path: Path) -> None:
    import onnxruntime

    spelling = Spelling(sinks=True)
    model, kwargs = Attention(spelling).eval(), inputs(spelling)
    fast = attnopt.optimize(model, Sparse(Blocks(3, 2), zero_pad=True), (), kwargs)
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {name: x.numpy() for name, x in kwargs.items()})
    assert near(torch.from_numpy(made), fast(**kwargs))


@pytest.mark.slow
def test_a_decoder_has_none(tmp_path: Path) -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.attention = nn.Embedding(9, 32), tiny_models.Attention(32, 4, causal=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            made: Tensor = self.attention(self.tokens(input_ids)) @ self.tokens.weight.mT
            return made

    ids, shapes = torch.randint(9, (2, 12)), {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    for backend, found in (("reference", "attention"), ("blocked", "it has")):
        fast = attnopt.optimize(
            Generator(), Sparse(Window(3, 0), zero_pad=True), (ids,), dynamic_shapes=shapes, backend=backend
        )
        with pytest.raises(attnopt.ExportError, match=found):
            fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=1)


# ---------------------------------------------------------------- timm's HaloNet
@pytest.fixture
def halo() -> Any:
    """timm's own blocks of 4 x 4 with a halo of 2, its weights loud, in double precision."""
    from timm.layers.halo_attn import HaloAttn

    torch.manual_seed(0)
    module = HaloAttn(32, num_heads=4, block_size=4, halo_size=2, qkv_bias=True).eval().double()
    for p in module.parameters():
        p.data.mul_(5)
    return module


class OfTokens(nn.Module):
    """The same projections over the whole image, without blocks and without relative positions."""

    def __init__(self, halo: Any) -> None:
        super().__init__()
        self.halo = halo

    def forward(self, x: Tensor) -> Tensor:
        heads, size = self.halo.num_heads, self.halo.dim_head_qk
        q = self.halo.q(x).flatten(2).unflatten(1, (heads, size)).mT
        kv = self.halo.kv(x).flatten(2).unflatten(1, (heads, -1)).mT
        o = ((q @ kv[..., :size].mT) * self.halo.scale).softmax(-1) @ kv[..., size:]
        return o.mT.reshape(x.shape[0], -1, *x.shape[2:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_timms_halonet(halo: Any) -> None:
    halo.pos_embed.height_rel.data.zero_()
    halo.pos_embed.width_rel.data.zero_()
    x = torch.randn(2, 32, 12, 8, dtype=torch.float64)
    pattern = recipes.halonet((12, 8), 4, 2)
    fast = attnopt.optimize(OfTokens(halo), Sparse(pattern, zero_pad=True), (x,))
    assert near(fast(x), halo(x))
    assert not near(attnopt.optimize(OfTokens(halo), Sparse(pattern), (x,))(x), halo(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_halonet_as_it_stands(halo: Any) -> None:
    """Its blocks are found with their relative positions, which no rewrite of tokens could keep at the keys beyond the edge."""
    x = torch.randn(2, 32, 12, 8, dtype=torch.float64)
    fast = attnopt.optimize(halo, "fuse", (x,))
    assert near(fast(x), halo(x))
    (site,) = fast.sites
    assert str(site.spec) == "4 heads x 8, self, Full(), bias, scale 0.3536"
    assert not site.bias_hides
    found = attnopt.inspect(halo, (x,)).sites[0].refusals["sparse"]
    assert (found.code, found.found) == ("needs-self-attention", "16 queries and 64 keys")


def test_other_passes_before_and_after() -> None:
    model, x, p = Attending(), torch.randn(2, 12, 16), PerHead({1: Blocks(4, 1), 2: Blocks(3, 5)}, Window(2))
    pad, prune, scale = Sparse(p, zero_pad=True), PruneHeads(heads=[0, 2]), ScaleHeads({1: 3.0, 3: 0.5})
    want = model.meant(x, p, (0.0, 3.0, 0.0, 0.5))
    for passes in ([pad, prune, scale], [prune, scale, pad], [scale, pad, prune]):
        assert near(attnopt.optimize(model, passes, (x,))(x), want)
    later = applied(LocalWindow(1), applied(Sparse(Blocks(4, 2), zero_pad=True), a_site()))
    assert later.spec.zero_keys == ZeroKeys(Blocks(4, 2))


@pytest.mark.parametrize("normalise", ["none", "logits"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_gains_leave_the_mass_of_zero_keys(backend: Backend, normalise: Any) -> None:
    p = Blocks(4, 3)
    gains = WeightGains((Part(Keys([0, 5]), (0.25,) * 4),), normalise)
    spec = a_spec(4, pattern=p, zero_keys=ZeroKeys(p), weight_gains=gains)
    t: dict[str, Any] = tensors(spec, 1, 9, 9, torch.float64, 0)
    q, k, v = (t[role] for role in "qkv")
    e = (spec.scale * q @ k.mT).exp() * p.mask(9, 9)
    zeros = torch.tensor([float(sum(not 0 <= at < 9 for at in window_of(p, i, 9))) for i in range(9)])[:, None]  # type: ignore[operator]
    factor = torch.ones(9, dtype=torch.float64).index_fill(0, torch.tensor([0, 5]), 0.25)
    total = e.sum(-1, keepdim=True) if normalise == "none" else (e * factor).sum(-1, keepdim=True)
    want = (e * factor / (total + zeros)) @ v
    assert torch.allclose(attention_of(backend, spec)(q, k, v, bias=None, mask=None, sinks=None), want, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_gradients(backend: Backend) -> None:
    p = Blocks(4, 3)
    spec = a_spec(4, pattern=p, zero_keys=ZeroKeys(p))
    t: dict[str, Any] = tensors(spec, 1, 9, 9, torch.float64, 0)
    leaves = [t[role].requires_grad_() for role in "qkv"]
    shown = torch.ones(9, 9, dtype=torch.bool)
    by_head = [padded(p, *(x[0, h] for x in leaves), lambda s: spec.scale * s, shown, None) for h in range(4)]
    want = torch.autograd.grad(torch.stack(by_head).square().sum(), leaves)
    o = attention_of(backend, spec)(*leaves, bias=None, mask=None, sinks=None)
    assert all(map(torch.allclose, torch.autograd.grad(o.square().sum(), leaves), want))


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"has_bias": True}, "[bias-beyond-edge] expected scores without a bias, found a bias, which has no entries for keys "
         "beyond the edge (at model.py:88)\n  hint: leave zero_pad out: keys beyond the edge are then masked"),
        ({"pattern": Causal()}, "[keys-already-hidden] expected queries that see all keys, found Causal() (at model.py:88)\n"
         "  hint: leave zero_pad out, or let the zero-padded pattern come first"),
        ({"has_mask": True, "seen_as": Window(3)}, "found Window(left=3, right=3)"),
        ({"zero_keys": ZeroKeys(Full())}, "found zero keys beyond the edges of Full()"),
        ({"is_cross": True}, "[needs-self-attention]"),
    ],
)  # fmt: skip
def test_attentions_that_cannot_be_padded(changes: dict[str, Any], text: str) -> None:
    assert text in refusal(Sparse(Blocks(4, 1), zero_pad=True), a_site(**changes))


def test_padding_ends_where_a_text_does() -> None:
    site = replace(a_site(q_len=3), alignment="last")
    assert Sparse(Window(2)).check(site) is None
    assert "found 3 queries after 9 past keys" in refusal(Sparse(Window(2), zero_pad=True), site)


def test_pools_and_padding_exclude_each_other() -> None:
    pad, pool = Sparse(Blocks(4, 1), zero_pad=True), PoolKeys(3, heads=[1])
    assert "[already-pooled]" in refusal(pad, applied(pool, a_site()))
    assert refusal(pool, applied(pad, a_site())).startswith(
        "[zero-padded] expected keys that are all tokens, found zero keys beyond the edges of Blocks(size=4, halo=1)"
    )


@pytest.mark.parametrize(
    "p",
    [
        Causal(), Blocks(4, 1) & Window(2), ~Window(2), Blocks(4, 1, edge="shift"), Neighborhood(12, 3),
        Neighborhood(12, 3, causal=True, edge="clip"), PerHead({1: Blocks(4)}, default=Causal()), Prefix(1, Causal()),
    ],
    ids=str,
)  # fmt: skip
def test_patterns_without_windows(p: Pattern) -> None:
    with pytest.raises(PolicyError, match=r"sparse: zero_pad=True: .* has no windows that are clipped at the edges"):
        Sparse(p, zero_pad=True)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"zero_keys": Blocks(4)}, "zero_keys is Blocks(size=4, halo=0), expected ZeroKeys or None"),
        ({"zero_keys": ZeroKeys(Causal())}, "zero_keys: Causal() has no windows that are clipped at the edges"),
        ({"zero_keys": ZeroKeys(Blocks(4)), "has_bias": True}, "zero_keys and a bias, which has no entries for keys"),
        (
            {"zero_keys": ZeroKeys(Blocks(4)), "pooling": attnopt.passes.PoolKeys(3)._pools([1])},
            "zero_keys and pooling: pooled keys have no neighbours",
        ),
    ],
)
def test_rules(changes: dict[str, Any], rule: str) -> None:
    spec = a_spec(4, has_bias="has_bias" in changes)
    assert any(broken.startswith(rule) for broken in verify_spec(spec, replace(spec, **changes)))


def test_a_backend_without_sinks_refuses() -> None:
    site = Site("", a_spec(4, zero_keys=ZeroKeys(Blocks(4))), {}, q_len=9, kv_len=9)
    assert accepts(Blocked(), site) is None
    found = accepts(Sdpa(), site)
    assert found is not None
    assert found.code == "no-sinks"
    with pytest.raises(ValueError, match="without its zero keys"):
        Blocked().lower(site.spec)
