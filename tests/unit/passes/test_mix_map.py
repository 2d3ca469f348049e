"""MixMap: against the user's model with the map mixed into its attention weights by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import tiny_models
import torch
import zoo
from models import LENGTH, OTHER, Attention, Spelling, inputs
from must_match import MUST_MATCH
from sites import a_site, applied, refusal, wrong
from torch import Tensor

import attnopt
from attnopt.errors import ConversionError, PolicyError
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import Scaled
from attnopt.passes import (
    DynamicSparse,
    GroupedQuery,
    HeadPatch,
    LocalWindow,
    MixMap,
    PoolKeys,
    PruneHeads,
    RouteHeads,
    ScaleHeads,
    SegmentGain,
    Steer,
)

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHOWN = [
    s
    for s, _ in MUST_MATCH
    if s.heads >= 3 and s.core == "matmul" and s.softmax in ("F", "torch", "method") and s.returns == "output"
    and not s.windows and not s.after
]  # fmt: skip
UNEVEN = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2)  # every size another
CROSS = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, cross=True, mask=("padding",))


def a_map(s: Spelling, heads: int | None = None, seed: int = 0) -> Tensor:
    """Of any numbers: negative ones, too, and rows of any sum."""
    sizes = (() if heads is None else (heads,)) + (LENGTH, OTHER if s.cross else LENGTH)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def by_hand(
    model: Attention, given: dict[str, Tensor], gates: dict[int, float], maps: Tensor | dict[int, Tensor]
) -> list[Tensor]:
    """The model with its own maps A_h replaced by (1 - g_h) A_h + g_h P_h."""
    return oracle.run_edited(model, (), given, {0: mixing(model.s, gates, maps)})


def mixing(s: Spelling, gates: dict[int, float], maps: Tensor | dict[int, Tensor], **more: Any) -> oracle.Edit:
    def weights(p_BHLS: Tensor) -> Tensor:
        """Whatever its layout: [B, H, L, S], [B, G, r, L, S] or [B * H, L, S], with the column of a sink last."""
        p = p_BHLS.reshape(-1, s.heads, *p_BHLS.shape[-2:]).clone()
        for h, g in gates.items():
            mine = maps if isinstance(maps, Tensor) else maps[h]
            p[:, h, :, : mine.shape[1]] = (1 - g) * p[:, h, :, : mine.shape[1]] + g * mine.to(p.dtype)
        return p.reshape(p_BHLS.shape)

    return oracle.Edit(weights=weights, **more)


# ---------------------------------------------------------------- the law
@pytest.mark.parametrize("s", [*SHOWN[::7], UNEVEN, CROSS, Spelling(bias=False), Spelling(sinks=True)], ids=str)
def test_law_mixing_is_the_map_by_hand(s: Spelling) -> None:
    model, given, maps = Attention(s), inputs(s, batch=3), a_map(s, 2)
    model_given = given
    for gate in (0.25, [0.75, 1.0]):
        fast = attnopt.optimize(model, MixMap(maps, gate, [2, 0]), (), model_given)
        gates = dict(zip((2, 0), gate if isinstance(gate, list) else [gate] * 2, strict=True))
        want = by_hand(model, given, gates, {2: maps[0], 0: maps[1]})
        assert [site.status for site in fast.report.sites] == ["rewritten"], fast.report
        oracle.assert_same(oracle.run(fast, (), given), want)
        oracle.assert_differs(want, oracle.run(model, (), given))


@pytest.mark.parametrize("s", [UNEVEN, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_every_head_of_every_backend(s: Spelling, per_head: bool, backend: str) -> None:
    model, given = Attention(s), inputs(s)
    maps = a_map(s, 6 if per_head else None)
    gates = [0.0, 0.5, 1.0, 0.125, 0.5, 1.0]
    of_head = {h: maps[h] if per_head else maps for h in range(6)}
    for heads in (None, [5, 4, 3, 2, 1, 0]):
        fast = attnopt.optimize(model, MixMap(maps, gates, heads), (), given, backend=backend)
        order = heads or range(6)
        mine = {h: maps[i] if per_head else maps for i, h in enumerate(order)} if heads else of_head
        oracle.assert_same(
            oracle.run(fast, (), given), by_hand(model, given, dict(zip(order, gates, strict=True)), mine)
        )


def test_no_gate_is_no_change() -> None:
    model, given = Attention(UNEVEN), inputs(UNEVEN)
    fused = attnopt.optimize(model, "fuse", (), given)
    for p in (
        MixMap(a_map(UNEVEN), 0.0),
        MixMap(a_map(UNEVEN, 2), [0, 0], [1, 3]),
        MixMap(a_map(UNEVEN), torch.zeros(6)),
    ):
        fast = attnopt.optimize(model, p, (), given)
        assert fast.sites[0].spec == fused.sites[0].spec
        assert nodes(fast) == nodes(fused)
        assert [n for n, _ in fast.named_buffers()] == [n for n, _ in fused.named_buffers()]
    (edit,) = applied(MixMap(torch.ones(12, 12), [0.0, 0.5, 0.0, 1.0]), a_site()).spec.after
    assert edit.changed == (1, 3)
    assert edit.overwritten == (3,)


def nodes(fast: attnopt.OptimizedModel) -> list[str]:
    return [str(n.target) for n in fast.graph_module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_a_full_gate_is_the_map_alone(backend: str) -> None:
    s = UNEVEN
    model, given, maps = Attention(s), inputs(s), a_map(s)
    fast = attnopt.optimize(model, MixMap(maps, 1), (), given, backend=backend)
    v = model.stored("v")
    values = torch.nn.functional.linear(given["x"], *v).unflatten(-1, (3, 2)).transpose(1, 2)
    mixed = (maps @ values).repeat_interleave(2, 1).transpose(1, 2).flatten(2)
    oracle.assert_same(oracle.run(fast, (), given), [mixed @ model.w_out.T + model.b_out])
    sizes = sorted(p.numel() for p in fast.parameters())
    assert sizes == sorted(p.numel() for n, p in model.named_parameters() if n[0] not in "qk")
    assert not [n for n in nodes(fast) if "softmax" in n or "attention" in n]
    (entry,) = fast.report.sites
    assert entry.cost_after is not None
    assert entry.cost_after.flops == 2 * 6 * 2 * LENGTH * LENGTH + 2 * LENGTH * (6 * 11 + 12 * 11)
    some = attnopt.optimize(model, MixMap(maps, 1, [0, 1, 2, 3, 4]), (), given)
    assert len(list(some.named_parameters())) == len(list(model.named_parameters()))


def test_a_barely_open_gate_is_not_closed() -> None:
    s = Spelling(heads=2, kv_heads=2)
    model, given, maps = Attention(s).double(), {"x": inputs(s)["x"].double()}, 1e6 * a_map(s)
    fast = attnopt.optimize(model, MixMap(maps, 1e-9), (), given)
    want = by_hand(model, given, {0: 1e-9, 1: 1e-9}, maps)
    oracle.assert_same(oracle.run(fast, (), given), want)
    oracle.assert_differs(want, oracle.run(model, (), given))
    nearly = attnopt.optimize(model, MixMap(1e-9 * maps, 1 - 1e-9), (), given)
    assert [n for n in nodes(nearly) if "attention" in n]


# ---------------------------------------------------------------- with other passes
def test_with_other_passes() -> None:
    s = UNEVEN
    model, given, maps = Attention(s), inputs(s), a_map(s)
    mix, gates = MixMap(maps, [0.5, 1.0], [1, 2]), {1: 0.5, 2: 1.0}
    two = {1: 3.0, 2: -2.0, 4: 0.5}
    window = torch.ones(LENGTH, LENGTH).tril(1).triu(-1).bool()
    factors = tuple(two.get(h, 1.0) for h in range(6))
    silent = (1.0, 0.0, 1.0, 0.0, 1.0, 1.0)
    for policy, edit in (
        ([mix, ScaleHeads(two)], mixing(s, gates, maps, gains=factors)),
        ([LocalWindow(1), mix], mixing(s, gates, maps, visible=window)),
        ([mix, LocalWindow(1)], mixing(s, gates, maps, visible=window)),
        ([mix, PruneHeads(heads=[1, 3])], mixing(s, gates, maps, gains=silent)),
        ([PruneHeads(heads=[1, 3]), mix], mixing(s, gates, maps, gains=silent)),
        ([mix, HeadPatch([1, 3])], mixing(s, gates, maps, gains=silent)),
        ([mix, SegmentGain(range(LENGTH), 1.0)], mixing(s, gates, maps)),
    ):
        fast = attnopt.optimize(model, policy, (), given)
        assert fast.report.sites[0].status == "rewritten", fast.report
        want = oracle.run_edited(model, (), given, {0: edit})
        oracle.assert_same(oracle.run(fast, (), given), want, str(policy))


def test_gains_of_heads_that_a_map_replaces_are_gone() -> None:
    gains, maps = ScaleHeads({0: 2.0, 1: 3.0, 2: 4.0}), torch.ones(12, 12)
    edits = applied(MixMap(maps, [0.5, 1.0], [0, 1]), applied(gains, a_site())).spec.after
    assert [edit.kind for edit in edits] == ["scaled", "mixed", "scaled"]
    assert edits[0] == Scaled(((0, 2.0),))
    assert edits[2] == Scaled(((2, 4.0),))


def test_earlier_edits_count_by_what_the_gate_leaves() -> None:
    s = UNEVEN
    model, given, maps = Attention(s), inputs(s), a_map(s)
    mix = MixMap(maps, [0.25, 1.0], [1, 2])
    by = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    W = model.w_out.detach().unflatten(1, (6, 2))
    plain = oracle.run(attnopt.optimize(model, mix, (), given), (), given)
    fast = attnopt.optimize(model, [Steer(by, [1, 2]), mix], (), given)
    oracle.assert_same(oracle.run(fast, (), given), [plain[0] + 0.75 * W[:, 1] @ by[0]])
    scaled = attnopt.optimize(model, [ScaleHeads({1: 3.0, 2: 5.0, 4: 0.5}), mix], (), given)

    def weights(p: Tensor) -> Tensor:
        q = p.clone()
        q[:, 1], q[:, 2], q[:, 4] = 0.75 * 3 * p[:, 1] + 0.25 * maps, maps, 0.5 * p[:, 4]
        return q

    want = oracle.run_edited(model, (), given, {0: oracle.Edit(weights=weights)})
    oracle.assert_same(oracle.run(scaled, (), given), want)
    twice = attnopt.optimize(model, [mix, MixMap(2 * maps, 0.5, [2, 3])], (), given)
    want = by_hand(model, given, {1: 0.25, 2: 1.0, 3: 0.5}, {1: maps, 2: 1.5 * maps, 3: 2 * maps})
    oracle.assert_same(oracle.run(twice, (), given), want)


@pytest.mark.slow
def test_routes_and_chosen_blocks_and_pools() -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, bias=False)
    model, given, maps = Attention(s), inputs(s), a_map(s, 6)
    (v,) = (w for w in model.stored("v") if w is not None)
    values = torch.nn.functional.linear(given["x"], v).unflatten(-1, (3, 2)).transpose(1, 2).repeat_interleave(2, 1)
    moved = torch.einsum("hls,bhsd,ohd->blo", maps, values, model.w_out.unflatten(1, (6, 2)))
    for one in (RouteHeads([0], 1), DynamicSparse(keep=1), PoolKeys(7), SegmentGain([0, 3], 0.5, normalise="none")):
        alone, both = (attnopt.optimize(model, p, (), given) for p in (one, [one, MixMap(maps, 0.25)]))
        assert [m.report.sites[0].status for m in (alone, both)] == ["rewritten"] * 2
        (got,) = oracle.run(alone, (), given)
        oracle.assert_same(oracle.run(both, (), given), [0.75 * got + 0.25 * moved], str(one))


@pytest.mark.slow
def test_merged_keys_and_values() -> None:
    model, x = tiny_models.Attention(16, 4), torch.randn(2, 12, 16)
    maps = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(1))
    for order in (1, -1):
        policy = [GroupedQuery(kv_heads=2), MixMap(maps, 0.5)][::order]
        fast = attnopt.optimize(model, policy, (x,))
        assert fast.report.sites[0].status == "rewritten", fast.report
        merged = attnopt.optimize(model, GroupedQuery(kv_heads=2), (x,))
        weights = oracle.Edit(weights=lambda p: 0.5 * p + 0.5 * maps)
        same = oracle.run_edited(merged_by_hand(model), (x,), None, {0: weights})
        oracle.assert_same([merged(x)], oracle.run(merged_by_hand(model), (x,)))
        oracle.assert_same([fast(x)], same)


def merged_by_hand(model: tiny_models.Attention) -> tiny_models.Attention:
    """The keys and values of neighbours replaced by their means."""
    import copy

    made = copy.deepcopy(model)
    for layer in (made.k, made.v):
        for p in (layer.weight, layer.bias):
            if p is not None:
                heads = p.data.unflatten(0, (2, 2, -1))
                p.data = heads.mean(1, keepdim=True).expand_as(heads).flatten(0, 2).clone()
    return made


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("s", [UNEVEN, CROSS], ids=["self", "cross"])
def test_saved_and_exported(s: Spelling, tmp_path: Path) -> None:
    model, given, maps = Attention(s), inputs(s), a_map(s, 6)
    fast = attnopt.optimize(
        model, MixMap(maps, [0.5, 1, 0, 0.25, 0.5, 1]), (), given,
        dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in given},
    )  # fmt: skip
    assert "a map of 7 x" in fast.report.sites[0].spec_after
    fast.save(tmp_path / "saved")
    fast.export_onnx(tmp_path / "m.onnx")
    loaded = attnopt.load(tmp_path / "saved")
    assert [site.spec for site in loaded.sites] == [site.spec for site in fast.sites]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for batch in (2, 5, 1):
        other = inputs(s, batch=batch)
        want = by_hand(model, other, {0: 0.5, 1: 1.0, 3: 0.25, 4: 0.5, 5: 1.0}, dict(enumerate(maps)))
        oracle.assert_same(oracle.run(fast, (), other), want)
        oracle.assert_same(oracle.run(loaded, (), other), oracle.run(fast, (), other), limit=0.0)
        found = session.run(None, {i.name: other[i.name].numpy() for i in session.get_inputs()})
        oracle.assert_same([torch.from_numpy(found[0])], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    s = UNEVEN
    model, given, maps = Attention(s).to(dtype), {"x": inputs(s)["x"].to(dtype)}, a_map(s, 6)
    for given_maps in (maps, maps.double(), maps.to(torch.bfloat16)):
        fast = attnopt.optimize(model, MixMap(given_maps, 0.5), (), given)
        want = by_hand(model, given, dict.fromkeys(range(6), 0.5), dict(enumerate(given_maps)))
        oracle.assert_same(oracle.run(fast, (), given), want)


def test_training_the_rest() -> None:
    s = UNEVEN
    model, given = Attention(s), inputs(s)
    fast = attnopt.optimize(model, MixMap(a_map(s), 0.5), (), given)
    fast.train()
    fast(**given).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in fast.parameters())


@pytest.mark.slow
def test_no_class_holds_it() -> None:
    model, args, _ = zoo.deit()
    with pytest.raises(ConversionError, match="edits of its head outputs cannot be folded"):
        attnopt.convert(model, MixMap(torch.ones(18, 18), 0.5), args)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbart", "starcoder2"])
def test_law_in_models(name: str) -> None:
    model, args, kwargs = zoo.BY_NAME[name].build()
    sites = attnopt.inspect(model, args, kwargs).sites
    random = torch.Generator().manual_seed(3)
    policy = {s.name: MixMap(torch.randn(s.q_len, s.kv_len, generator=random), 0.5, [1]) for s in sites}
    fast = attnopt.optimize(model, policy, args, kwargs)
    assert {site.status for site in fast.report.sites} == {"rewritten"}

    def edit(index: int, sizes: tuple[int, ...]) -> oracle.Edit:
        maps = policy[sites[index].name].map
        assert isinstance(maps, Constant)

        def weights(p: Tensor) -> Tensor:
            q = p.clone()
            q[:, 1] = 0.5 * p[:, 1] + 0.5 * maps.tensor()
            return q

        return oracle.Edit(weights=weights)

    want = oracle.run_edited(model, args, kwargs, edit)
    oracle.assert_same(oracle.run(fast, args, kwargs), want)
    oracle.assert_differs(want, oracle.run(model, args, kwargs))


# ---------------------------------------------------------------- options and refusals
def test_policies_read_back(tmp_path: Path) -> None:
    for p in (
        MixMap(torch.randn(2, 3), 0.5, [2, 1]),
        MixMap([[0.1, 2]], [0.5]),
        MixMap(torch.randn(2, 3, 4).half(), [0, 1]),
    ):
        policy = attnopt.Policy.of(p)
        assert attnopt.Policy.from_json(policy.to_json()) == policy
    same = attnopt.Policy.of(MixMap([[0.5, -1.0]], (0.5, 1.0), [1, 0]))
    assert attnopt.Policy.of("mix-map(map=[[0.5, -1.0]], gate=[0.5, 1.0], heads=[1, 0])") == same
    (tmp_path / "p.yaml").write_text('"*": [{pass: mix-map, map: [[0.5, -1.0]], gate: [0.5, 1], heads: [1, 0]}]')
    assert attnopt.Policy.of(str(tmp_path / "p.yaml")) == same
    assert attnopt.Policy.of(MixMap([[0.5]], torch.tensor([0.5, 1.0]))) == attnopt.Policy.of(MixMap([[0.5]], [0.5, 1]))


SQUARE = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixMap(torch.tensor([[1.0, torch.nan]]), 0.5), "invalid map of shape [1, 2]\n  hint: use finite floating"),
        (lambda: MixMap([[1.0, float("inf")]], 0.5), "invalid map [[1.0, inf]]"),
        (lambda: MixMap(torch.ones(3, 3, dtype=torch.long), 0.5), "invalid map of shape [3, 3]"),
        (lambda: MixMap(torch.ones(3), 0.5), "invalid map of shape [3]"),
        (lambda: MixMap(torch.ones(1, 2, 3, 3), 0.5), "invalid map of shape [1, 2, 3, 3]"),
        (lambda: MixMap(torch.ones(3, 2, 2), 0.5, [1, 0]), "numbers, [queries, keys] or [2, queries, keys]"),
        (lambda: MixMap(torch.ones(0, 2), 0.5), "invalid map of shape [0, 2]"),
        (lambda: MixMap([[1.0], [1.0, 2.0]], 0.5), "invalid map [[1.0], [1.0, 2.0]]"),
        (lambda: MixMap(wrong("eye"), 0.5), "invalid map 'eye'"),
        (lambda: MixMap(SQUARE, 1.5), "invalid value gate=1.5: expected numbers from 0 to 1"),
        (lambda: MixMap(SQUARE, [0.5, -0.1]), "invalid value gate=[0.5, -0.1]: expected numbers from 0 to 1"),
        (lambda: MixMap(SQUARE, float("nan")), "invalid value gate=nan: expected a finite number"),
        (lambda: MixMap(SQUARE, wrong("half")), "invalid value gate='half'"),
        (lambda: MixMap(SQUARE, wrong(True)), "invalid value gate=True"),
        (lambda: MixMap(SQUARE, []), "invalid value gate=[]"),
        (lambda: MixMap(SQUARE, [0.5], [0, 1]), "invalid value gate=[0.5]: expected one number or 2 of them"),
        (lambda: MixMap(SQUARE, 0.5, []), "invalid value heads=[]: expected at least one head, each listed once"),
        (lambda: MixMap(SQUARE, 0.5, [1, 1]), "invalid value heads=[1, 1]"),
    ],
)  # fmt: skip
def test_malformed_options(make: Any, message: str) -> None:
    with pytest.raises(PolicyError) as e:
        make()
    assert message in str(e.value), e.value


def test_what_is_refused() -> None:
    fits, pruned = torch.ones(12, 12), applied(PruneHeads(heads=[1]), a_site())
    assert "[unknown-head]" in refusal(MixMap(fits, 0.5, [4]), a_site())
    assert refusal(MixMap(torch.ones(12, 11), 0.5), a_site()) == (
        "[other-sizes] expected 12 queries and 11 keys in every call, found 12 and 12 (at model.py:88)\n"
        "  hint: give a map of the site's lengths"
    )
    assert MixMap(torch.ones(12, 11), 0.5).check(a_site(kv_len=11)) is None
    assert refusal(MixMap(fits, 0.5), a_site(is_dynamic=True)).endswith(
        "found a dynamic length (at model.py:88)\n  hint: remove the sequence axis from dynamic_shapes"
    )
    assert "one for all heads, or 4 maps, found 3 maps" in refusal(MixMap(torch.ones(3, 12, 12), 0.5), a_site())
    assert "one for all heads, or 4 gates, found 3 gates" in refusal(MixMap(fits, [0.5] * 3), a_site())
    assert applied(MixMap(fits, 0.5, [1]), pruned).spec == pruned.spec
    (edit,) = applied(
        MixMap(torch.arange(4.0)[:, None, None].expand(4, 12, 12), [0.1, 0.2, 0.3, 0.4]), pruned
    ).spec.after
    assert (
        edit
        == applied(
            PruneHeads(heads=[1]),
            applied(MixMap(torch.arange(4.0)[:, None, None].expand(4, 12, 12), [0.1, 0.2, 0.3, 0.4]), a_site()),
        ).spec.after[0]
    )
    assert edit.changed == (0, 2, 3)


def test_other_lengths_are_refused_when_called() -> None:
    s = UNEVEN
    fast = attnopt.optimize(Attention(s), MixMap(a_map(s), 0.5), (), inputs(s))
    with pytest.raises(Exception, match="7"):
        fast(**inputs(s, length=8))
    with pytest.warns(attnopt.AttnoptWarning, match="the policy changes nothing"):
        entry = attnopt.optimize(
            Attention(s), MixMap(a_map(s), 0.5), (), inputs(s), dynamic_shapes="auto"
        ).report.sites[0]
    assert entry.status == "refused"
    assert entry.refusals["mix-map"].found == "a dynamic length"


def test_subnormal_numbers_count_as_zero() -> None:
    row = [0.5, 1e-40, -1e-39, 2e-38]
    (edit,) = applied(MixMap(torch.tensor(row * 36).reshape(12, 12), 1.0), a_site()).spec.after
    assert edit.tensors[0].tensor().flatten().tolist()[:4] == torch.tensor([0.5, 0.0, 0.0, 2e-38]).tolist()
