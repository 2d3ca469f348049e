"""Blocks that are chosen at run time: what is kept, that nothing later is looked at, and that backends agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnxruntime
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import a_site, applied, refusal
from specs import a_spec, run, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import attnopt
from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.errors import PolicyError
from attnopt.fit.attention_recall import kept_mass
from attnopt.ir.block_scores import Antidiagonal, BlockScores, KMeans, Pooled
from attnopt.ir.constant import Constant
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.low_rank_scores import LowRank
from attnopt.ir.routing_scores import Routing
from attnopt.ir.score_registry import parse_scores
from attnopt.passes import DynamicSparse, LocalWindow, PruneHeads
from attnopt.patterns import Causal, Full, Sinks, Window

pytestmark = pytest.mark.usefixtures("one_capture")


def selection(scores: BlockScores, *options: Any, heads: int = 4, features: int = 8, **more: Any) -> DynamicBlocks:
    """With random maps where the scores are fitted."""
    g = torch.Generator().manual_seed(3)
    shapes = {LowRank: [(features, 3)] * 2, Routing: [(3, features), (2, 3)]}.get(type(scores), [])
    fitted = [Constant.of(torch.randn(heads, *shape, generator=g)) for shape in shapes]
    return DynamicBlocks(scores, *options, fitted=fitted, **more)


SCORES = st.sampled_from(
    [
        Pooled(),
        Antidiagonal(2),
        Antidiagonal(4),
        KMeans(3, 2),
        KMeans(20, 1),
        LowRank(3, 2, 1),
        LowRank(3, 1, 4),
        Routing(3, balanced=False),
    ]
)
KEEP = st.one_of(st.integers(1, 4), st.sampled_from([0.01, 0.25, 0.5, 0.8, 1.0]))
LOCAL_HEADS = st.sampled_from([(), (1,), (0, 3), (5,)])
SELECTIONS = st.builds(
    selection,
    SCORES,
    KEEP,
    st.sampled_from([4, 8]),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(0, 2),
    LOCAL_HEADS,
)
LENGTHS = st.integers(1, 45)


def operands(L: int, S: int, seed: int, **changes: Any) -> tuple[attnopt.AttentionSpec, dict[str, Any]]:
    spec = a_spec(kv_of_head=(0, 0, 1, 1), **changes)
    return spec, tensors(spec, 2, L, S, torch.float64, seed)


def chosen(p: DynamicBlocks, t: dict[str, Any], is_causal: bool) -> Tensor:
    k = t["k"].repeat_interleave(2, 1)
    return p.select(t["q"], k, 1.0, is_causal)


@settings(deadline=None)
@given(SELECTIONS, LENGTHS, st.booleans(), st.integers(0, 9))
def test_as_many_blocks_as_asked_for(p: DynamicBlocks, length: int, is_causal: bool, seed: int) -> None:
    _, t = operands(length, length, seed)
    kept = chosen(p, t, is_causal)
    rows = -(-length // p.block)
    assert kept.shape == (2, 4, rows, rows)
    for row in range(rows):
        of = row + 1 if is_causal else rows
        last = row + 1 if is_causal else min(rows, row + p.local)
        forced = {*range(min(p.sinks, of)), *range(max(0, row - p.local + 1), last)}
        if row < p.dense:
            forced = {*range(of)}
        wanted = min(p.keep, of) if isinstance(p.keep, int) else -int(-(of * p.keep - 1e-9) // 1)
        for b in range(2):
            for h in range(4):
                found = set(kept[b, h, row].nonzero().flatten().tolist())
                assert forced <= found <= set(range(of))
                assert len(found) == max(wanted, len(forced))


def test_the_best_blocks_are_kept() -> None:
    q, k = torch.zeros(1, 1, 32, 4), torch.zeros(1, 1, 32, 4)
    q[..., 0] = 1.0
    k[:, :, [*range(4), *range(8, 16)], 0] = 5.0  # what every query looks for: half of block 0, all of block 1
    k[:, :, [*range(4, 8), *range(16, 32)], 1] = 5.0
    for scores in (Pooled(), Antidiagonal(4), KMeans(4, 2)):
        for is_causal in (True, False):
            kept = DynamicBlocks(scores, keep=2, block=8, sinks=0).select(q, k, 1.0, is_causal)[0, 0]
            assert kept[3].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("is_causal", "keep", "want"),
    [
        (True, 3, [True, False, False, True, True, False]),
        (False, 3, [True, False, False, True, True, False]),
        (False, 4, [True, False, False, True, True, True]),
        (False, 5, [True, False, True, True, True, True]),
    ],
)
def test_local_heads_keep_the_nearest_blocks(is_causal: bool, keep: int, want: list[bool]) -> None:
    """Of a block before and one behind that are as near, the one before."""
    q, k = torch.ones(1, 2, 24, 4), torch.zeros(1, 2, 24, 4)
    k[:, :, 4:12] = 1.0
    p = DynamicBlocks("pooled", keep=keep, block=4, local_heads=[3])
    kept = p.select(q, k, 1.0, is_causal, (1, 3))[0, :, 4].tolist()
    assert kept[1] == want
    assert kept[0] == [i in (0, 4, 1, 2, 3)[:keep] for i in range(6)]


def test_dense_rows_keep_everything() -> None:
    p = DynamicBlocks("pooled", keep=1, block=4, sinks=0, dense=2)
    q = torch.randn(1, 1, 20, 4)
    assert p.select(q, q, 1.0, False)[0, 0].sum(1).tolist() == [5, 5, 1, 1, 1]
    assert p.select(q, q, 1.0, True)[0, 0].sum(1).tolist() == [1, 2, 1, 1, 1]


def test_of_equal_scores_the_first_are_kept() -> None:
    kept = DynamicBlocks("pooled", keep=3, block=4, sinks=0).select(
        torch.zeros(1, 1, 24, 4), torch.ones(1, 1, 24, 4), 1.0, True
    )
    assert kept[0, 0, 5].tolist() == [True, True, False, False, False, True]


def test_nan_is_not_hidden() -> None:
    q, k = torch.randn(2, 1, 1, 24, 4)
    k[0, 0, 5, 0] = torch.nan
    for scores in ("pooled", "antidiagonal(2)"):
        assert DynamicBlocks(scores, keep=1, block=4, sinks=0).select(q, k, 1.0, True)[0, 0, 2:, 1].all()


@pytest.mark.slow
def test_in_onnx_runtime(tmp_path: Any) -> None:
    scores = ("pooled", "antidiagonal(2)", "kmeans")
    model, x = torch.nn.Sequential(*(tiny_models.Attention() for _ in scores)), torch.randn(2, 12, 16)
    policy = {str(place): DynamicSparse(name, keep=1, block=4) for place, name in enumerate(scores)}
    fast = attnopt.optimize(model, policy, (x,), dynamic_shapes="auto", backend="sdpa")
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for length in (12, 9, 21):
        given_x = torch.randn(2, length, 16)
        (found,) = session.run(None, {session.get_inputs()[0].name: given_x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), fast(given_x), rtol=1e-4, atol=1e-5)


def test_pooled_and_antidiagonal_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, 5, generator=g).double(), torch.randn(1, 2, 4, 8, 5, generator=g).double()
    known = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
    pooled = Pooled().score(q, k, known, False)
    found = Antidiagonal(4).score(q, k, known, False)
    for h in range(2):
        for row in range(3):
            sums = torch.full((2, 4, 2), -torch.inf, dtype=torch.float64)  # strided queries, key blocks, strided keys
            for col in range(4):
                assert pooled[0, h, row, col] == pytest.approx(float(q[0, h, row].mean(0) @ k[0, h, col].mean(0)))
                for a in range(2):
                    for b in range(2):
                        pairs = ((4 * a + 3 - u, 4 * b + u) for u in range(4))
                        if known[row, col]:
                            sums[a, col, b] = sum(q[0, h, row, i] @ k[0, h, col, j] for i, j in pairs) / 4
            want = sums.flatten(1).softmax(1).reshape(2, 4, 2).sum((0, 2))
            torch.testing.assert_close(found[0, h, row], want)


@settings(deadline=None)
@given(SELECTIONS, st.integers(2, 45), st.integers(0, 12), st.integers(0, 9), st.data())
def test_nothing_later_is_looked_at(p: DynamicBlocks, length: int, more: int, seed: int, data: st.DataObject) -> None:
    """Other tokens from ``cut`` on, or none at all there, leave what is before bit for bit as it was."""
    spec, t = operands(length, length + more, seed, pattern=Causal(), selection=p)
    cut = data.draw(st.integers(1, length - 1))
    other = {name: x.clone() for name, x in t.items() if x is not None}
    other["q"][:, :, cut:] = 9 * torch.randn_like(other["q"][:, :, cut:])
    for name in ("k", "v"):
        other[name][:, :, more + cut :] = 9 * torch.randn_like(other[name][:, :, more + cut :])
    found, changed = run(Reference(), spec, t), run(Reference(), spec, {**t, **other})
    torch.testing.assert_close(changed[:, :, :cut], found[:, :, :cut], rtol=1e-12, atol=1e-12)
    if more == 0:
        shorter = {name: None if x is None else x[:, :, :cut] for name, x in t.items()}
        torch.testing.assert_close(run(Reference(), spec, shorter), found[:, :, :cut], rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(SELECTIONS, LENGTHS, LENGTHS, st.sampled_from([Full(), Causal(), Window(3) | Sinks(1)]), st.booleans())
def test_sdpa_follows_the_reference(p: DynamicBlocks, L: int, S: int, pattern: Any, has_mask: bool) -> None:
    spec, t = operands(L, S, 0, pattern=pattern, selection=p, has_mask=has_mask)
    torch.testing.assert_close(run(Sdpa(), spec, t), run(Reference(), spec, t))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("pattern", [Full(), Causal() & (Window(90, 0) | Sinks(1))])
def test_blocked_follows_the_reference(block: int, pattern: Any) -> None:
    p = DynamicBlocks("antidiagonal", keep=2, block=block, sinks=0)
    spec, t = operands(300, 300, 0, pattern=pattern, selection=p)
    t = {name: None if x is None else x.float() for name, x in t.items()}
    everything = run(Reference(), replace(spec, selection=None), t)
    found, want = run(Blocked(), spec, t), run(Reference(), spec, t)
    torch.testing.assert_close(found, want)
    assert pattern != Full() or not torch.allclose(want, everything)
    other = Blocked().check(replace(spec, selection=DynamicBlocks(block=32)))
    assert str(other) == "[other-blocks] expected a block size that is a multiple of 64, found blocks of 32"


def test_reports_tell_where_nothing_is_skipped() -> None:
    model, (x,) = tiny_models.causal()
    for backend in ("reference", "sdpa"):
        site = attnopt.optimize(model, DynamicSparse(), (x,), backend=backend).report.sites[0]
        assert site.notes[0] == f"{backend}: blocks that are not kept are masked, not skipped: no time is saved"
    blocked = attnopt.optimize(model, DynamicSparse(keep=1), (x,), backend="blocked")
    assert not any("masked" in note for note in blocked.report.sites[0].notes)
    assert DynamicBlocks(keep=2).share(1024) == 1 / 8
    assert DynamicBlocks(keep=2).share(0) == DynamicBlocks(keep=1.0).share(9) == 1.0


def test_reports_tell_the_mass_that_is_kept() -> None:
    model, (x,) = tiny_models.causal()
    policy = {"layers.1": [PruneHeads(heads=[1]), DynamicSparse(keep=1, block=4)], "*": []}
    fast = attnopt.optimize(model, policy, (x,), backend="sdpa")
    layer, hidden = model.layers[1], x + model.layers[0](x)
    q, k = (f(hidden).view(2, 12, 2, 8).transpose(1, 2) for f in (layer.q, layer.k))
    p = (q @ k.mT / 8**0.5).masked_fill(~Causal().mask(12, 12), -torch.inf).softmax(-1)
    block = torch.arange(12) // 4
    mass = (p * ((block == 0) | (block == block[:, None]))).sum(-1).mean((0, 2))
    least = int(mass.argmin())
    text = f"{mass.mean():.1%} attention recall on the example inputs, lowest in head {least}: {mass[least]:.1%}"
    assert fast.report.sites[1].notes[-1] == text
    assert fast.report.sites[0].notes == ()
    with_data = attnopt.optimize(model, policy, (x,), calibration=[torch.randn(2, 12, 16), x])
    assert "attention recall on the calibration data" in with_data.report.sites[1].notes[-1]
    everything = attnopt.optimize(model, DynamicSparse(keep=1.0), (x,))
    assert everything.report.sites[0].notes[-1].startswith("100.0% attention recall")


@settings(deadline=None)
@given(SCORES, LENGTHS, st.sampled_from([Full(), Causal()]))
def test_keeping_everything_changes_nothing(scores: BlockScores, length: int, pattern: Any) -> None:
    spec, t = operands(length, length, 0, pattern=pattern)
    selected = replace(spec, selection=selection(scores, 1.0, 4))
    assert torch.equal(run(Reference(), selected, t), run(Reference(), spec, t))
    torch.testing.assert_close(kept_mass(t["q"], t["k"], selected), torch.ones(2, 4))


@settings(deadline=None)
@given(SCORES, st.integers(5, 60), st.sampled_from([Full(), Causal()]), st.booleans())
def test_kept_mass_grows_with_what_is_kept(scores: BlockScores, length: int, pattern: Any, has_sinks: bool) -> None:
    spec, t = operands(length, length, 1, pattern=pattern, has_bias=True, has_sinks=has_sinks)
    others = {name: t[name] for name in ("bias", "mask", "sinks")}
    before = torch.zeros(2, 4)
    for keep in (1, 2, 4, 8, 1.0):
        selected = replace(spec, selection=selection(scores, keep, 4))
        mass = kept_mass(t["q"], t["k"], selected, **others)
        assert (mass >= before - 1e-6).all()
        assert (mass <= 1 + 1e-6).all()
        before = mass


def test_kept_mass_by_hand() -> None:
    spec, t = operands(10, 10, 2, pattern=Causal())
    p = DynamicBlocks("pooled", keep=1, block=4, sinks=1)
    s = (spec.scale * t["q"] @ t["k"].repeat_interleave(2, 1).mT).masked_fill(~Causal().mask(10, 10), -torch.inf)
    block = torch.arange(10) // 4
    kept = (block == 0) | (block == block[:, None])
    want = (s.softmax(-1) * kept).sum(-1).mean(-1)
    torch.testing.assert_close(kept_mass(t["q"], t["k"], replace(spec, selection=p)), want, check_dtype=False)
    assert torch.equal(kept_mass(t["q"], t["k"], spec), torch.ones(2, 4))


def test_balanced_routing_traces_with_symbolic_lengths() -> None:
    test_it_traces_with_symbolic_lengths(Routing(3), False)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scores", [Pooled(), Antidiagonal(4), KMeans(3, 2), LowRank(3, 2), Routing(3, False)])
def test_it_traces_with_symbolic_lengths(scores: BlockScores, is_causal: bool) -> None:
    p = selection(scores, 0.4, 4, heads=2, features=5, local_heads=[1], dense=1)
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def made(length: int) -> Tensor:
        sizes = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(torch.randn(1, 2, length, 5), symbolic_context=context)

    def keys_seen(q: Tensor, k: Tensor, *maps: Tensor) -> Tensor:
        return p.spread(p.using(maps).select(q, k, 0.5, is_causal), q.shape[2], k.shape[2])

    maps = [c.tensor() for c in p.fitted]
    inputs = made(13), made(18), *map(mode.from_tensor, maps)
    with mode:
        graph = make_fx(keys_seen, pre_dispatch=True)(*inputs)
    assert not [n for n in graph.graph.nodes if n.op == "get_attr"]
    for q_len, kv_len in ((13, 18), (7, 7), (21, 21), (4, 30)):
        q, k = torch.randn(1, 2, q_len, 5), torch.randn(1, 2, kv_len, 5)
        assert torch.equal(graph(q, k, *maps), keys_seen(q, k, *maps))


@settings(deadline=None)
@given(SELECTIONS)
def test_notation_reads_back(p: DynamicBlocks) -> None:
    assert DynamicBlocks.from_json(p.to_json()) == p
    assert parse_scores(p.scores.to_json()) == p.scores
    heads = [h for h in p.local_heads if h < 4]
    policy = attnopt.Policy.of(DynamicSparse(p.scores, p.keep, p.block, p.sinks, p.local, p.dense, heads))
    assert attnopt.Policy.from_json(policy.to_json()) == policy
    if not p.fitted:
        made = applied(policy.passes_for("")[0], a_site()).spec
        assert made.selection == replace(p, local_heads=heads)
    left = applied(PruneHeads(heads=[0]), a_site(selection=p)).spec.selection
    assert left is not None
    assert replace(left, fitted=(), local_heads=()) == replace(p, fitted=(), local_heads=())
    assert left.local_heads == tuple(h for h in heads if h)
    for part, whole in zip(left.fitted, p.fitted, strict=True):
        assert torch.equal(part.tensor(), whole.tensor()[1:])


def test_names_of_scores() -> None:
    assert parse_scores("kmeans") == parse_scores("KMeans(clusters=16)") == KMeans()
    assert DynamicSparse("antidiagonal(4)").scores == Antidiagonal(4)
    assert str(DynamicBlocks()) == "DynamicBlocks(scores=Pooled(), keep=0.25, block=64, sinks=1, local=1)"
    assert str(DynamicBlocks(dense=2, local_heads=[3, 1])).endswith("local=1, dense=2, local_heads=(1, 3))")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "poold"}, "unknown block score 'poold'; available: Pooled, Antidiagonal, KMeans, LowRank, Routing"),
        ({"scores": "1"}, "unknown block scores '1'"),
        ({"scores": 3}, "invalid value scores=3: expected block scores or their text"),
        ({"scores": "antidiagonal(6)"}, "Antidiagonal: stride=6 does not divide blocks of 64 tokens"),
        ({"scores": "antidiagonal(0)"}, "Antidiagonal: invalid value stride=0"),
        ({"scores": "kmeans(0)"}, "KMeans: invalid value clusters=0"),
        ({"keep": 0.0}, "invalid value keep=0.0: expected a fraction above 0 and at most 1.0"),
        ({"keep": 1.5}, "invalid value keep=1.5"),
        ({"keep": 0}, "invalid value keep=0: expected an integer from 1"),
        ({"keep": float("nan")}, "invalid value keep=nan"),
        ({"block": 0}, "invalid value block=0"),
        ({"sinks": -1}, "invalid value sinks=-1"),
        ({"local": 0}, "invalid value local=0"),
        ({"dense": -1}, "invalid value dense=-1"),
        ({"local_heads": [-1]}, "invalid value local_heads=-1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        DynamicSparse(**options)
    assert message in str(caught.value)


def test_where_it_cannot_be_applied() -> None:
    assert "[needs-self-attention]" in refusal(DynamicSparse(), a_site(is_cross=True))
    assert refusal(DynamicSparse(local_heads=[2, 4]), a_site()).startswith("[unknown-head]")
    pruned = applied(PruneHeads(heads=[2]), a_site())
    assert applied(DynamicSparse(local_heads=[1, 2]), pruned).spec.selection == DynamicBlocks(local_heads=[1])
    twice = applied(DynamicSparse(), a_site())
    assert refusal(DynamicSparse(), twice).startswith(
        "[already-selected] expected an attention without block selection, found DynamicBlocks("
    )


@pytest.mark.slow
def test_in_a_model(tmp_path: Any) -> None:
    model, x = tiny_models.Attention(), torch.randn(2, 12, 16)
    everything = attnopt.optimize(model, DynamicSparse(keep=1.0, block=4), (x,))
    torch.testing.assert_close(everything(x), model(x))
    policy = [LocalWindow(9), DynamicSparse("antidiagonal(2)", keep=1, block=2), PruneHeads(heads=[1])]
    for dynamic_shapes in (None, "auto"):
        fast = attnopt.optimize(model, policy, (x,), dynamic_shapes=dynamic_shapes)
        out = fast(x)
        assert not torch.allclose(out, model(x))
        other = torch.cat([x[:, :7], torch.randn(2, 5, 16)], 1)
        torch.testing.assert_close(fast(other)[:, :7], out[:, :7])
        fast.save(tmp_path / str(dynamic_shapes))
        again = attnopt.load(tmp_path / str(dynamic_shapes))
        assert torch.equal(again(x), out)
        assert again.sites[0].spec == fast.sites[0].spec
        assert "DynamicBlocks(scores=Antidiagonal(stride=2), keep=1" in str(fast.report)
    torch.testing.assert_close(fast(x[:, :7]), out[:, :7])
