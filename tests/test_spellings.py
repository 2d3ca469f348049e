"""Every spelling of the grammar in ``models``: found, read off exactly, fused without a change, rewritten as the oracle says."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from models import LENGTH, Attention, Spelling, inputs

import attnopt
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Causal, Pattern, Sinks, Strided, Window

EXAMPLES = os.environ.get("ATTNOPT_EXAMPLES")
PROPERTY = settings(
    max_examples=int(EXAMPLES or 60),
    deadline=None,
    derandomize=EXAMPLES is None,  # the same examples at every `make test`, new ones at every `make fuzz`
    phases=[p for p in Phase if EXAMPLES is not None or p in (Phase.explicit, Phase.generate)],
    suppress_health_check=list(HealthCheck),
)

SIZES = st.sampled_from([(4, 4), (4, 4), (6, 6), (4, 2), (6, 3), (6, 2), (4, 1), (3, 3), (1, 1), (2, 2)])
MASKS = ["causal", "window", "left", "padding", "float-padding", "given"]
CORES = [
    "matmul", "bmm", "baddbmm", "einsum", "heads-last", "channels", "transposed", "mulsum", "sdpa", "grouped",
    "grouped-einsum",
]  # fmt: skip
SOFTMAXES = [
    "F", "torch", "method", "positive", "float32", "upcast", "exp", "stable-exp", "log", "lse", "late", "later",
]  # fmt: skip


@st.composite
def spellings(draw: st.DrawFn) -> Spelling:
    def pick(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    heads, kv_heads = draw(SIZES)
    return Spelling(
        heads=heads, kv_heads=kv_heads, width=pick(12, 15), head_dim=pick(4, 5, 6), value_dim=pick(4, 3),
        bias=draw(st.booleans()), op=pick("linear", "linear", "parameter", "addmm", "conv1d", "conv2d", "einsum"),
        packing=pick("separate", "fused", "kv", "per-head", "per-group"), order=pick("qkv", "qvk", "kqv", "vqk"),
        unpack=pick("chunk", "split", "slice", "unbind", "select"), core=pick(*CORES),
        share=pick("repeat_interleave", "expand", "tiled", "enable_gqa", "broadcast"),
        rope=pick("", "", "half", "interleaved", "complex"), norm=pick("", "", "", "layer", "rms", "l2", "across"),
        scale=pick("q", "k", "both", "mul", "div", "alpha", "none", "buffer", "temperature"),
        mask=tuple(draw(st.lists(st.sampled_from(MASKS), max_size=2, unique=True))), made=pick("tril", "triu", "arange"),
        apply=pick("add-inf", "add-min", "lerp", "where", "masked_fill", "old-gpt"), commuted=draw(st.booleans()),
        bias_kind=pick("", "", "", "alibi", "table", "addend"), softcap=pick(None, None, None, 5.0),
        sinks=pick(False, False, False, True), softmax=pick(*SOFTMAXES), cross=pick(False, False, False, True),
        pre_norm=draw(st.booleans()), residual=draw(st.booleans()), dropout=draw(st.booleans()),
    ).repaired()  # fmt: skip


# ---------------------------------------------------------------- helpers
@dataclass(frozen=True)
class Case:
    """A spelling's model with its inputs."""

    s: Spelling
    model: Attention
    given: dict[str, Any]

    @classmethod
    def of(cls, s: Spelling, **options: Any) -> Case:
        return cls(s, Attention(s, **options), inputs(s))

    def own(self) -> list[torch.Tensor]:
        return oracle.run(self.model, (), self.given)

    def meant(self, visible: torch.Tensor | None, gains: dict[int, float]) -> list[torch.Tensor]:
        edits = {} if visible is None else {0: oracle.Edit(visible)}
        return oracle.run_edited(
            self.model.with_gains(gains), (), self.given, edits, heads=self.s.heads, exponentials=self.s.exponentials
        )

    def leaves_each_query_a_key(self, visible: torch.Tensor) -> bool:
        """A query that sees nothing gets zeros from attnopt and NaN, or the mean of hidden keys, from the model."""
        for kind in self.s.mask:
            if kind != "given":
                seen = self.model._visible(kind, *visible.shape[-2:], self.given.get("padding"))
                visible = visible & seen
        return bool(visible.any(-1).all())

    def optimized(self, policy: Any) -> attnopt.OptimizedModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attnopt.AttnoptWarning)
            return attnopt.optimize(self.model, policy, (), self.given)


def is_site(case: Case, fast: attnopt.OptimizedModel) -> bool:
    """The one attention was found; if it may be missed, a near miss tells why."""
    if len(fast.sites) == 1:
        return True
    assert not fast.sites
    assert case.s.may_be_missed, f"not found: {[str(n.refusal) for n in fast.report.near_misses]}"
    assert fast.report.near_misses
    return False


def check(case: Case, policy: Any, visible: torch.Tensor | None, gains: dict[int, float]) -> None:
    """Rewritten as the oracle says, or refused with a reason and the model's own output."""
    if visible is not None:
        assume(case.leaves_each_query_a_key(visible))
    fast = case.optimized(policy)
    own, got = case.own(), oracle.run(fast, (), case.given)
    if not is_site(case, fast):
        oracle.assert_same(got, own, "missed")
        return
    (entry,) = fast.report.sites
    if entry.status == "rewritten" and not entry.refusals:
        oracle.assert_same(got, case.meant(visible, gains), str(policy))
        return
    assert entry.status == "refused"
    assert entry.refusals
    assert all(r.code and (r.expected or r.found) for r in entry.refusals.values())
    oracle.assert_same(got, own, "refused")


# ---------------------------------------------------------------- properties
@PROPERTY
@given(spellings())
@example(Spelling(op="parameter", packing="per-group", kv_heads=4))
@example(Spelling(softmax="stable-exp"))
def test_properties_fuse_changes_nothing(s: Spelling) -> None:
    case = Case.of(s)
    fast = case.optimized("fuse")
    oracle.assert_same(oracle.run(fast, (), case.given), case.own(), "fuse")
    if not is_site(case, fast):
        return
    refusals = fast.report.sites[0].refusals
    if s.softcap or s.sinks:  # no fused operator has these: plain operators are what the model has already
        assert {r.code for r in refusals.values()} <= {"no-softcap", "no-sinks"}
    else:
        assert fast.report.sites[0].status == "rewritten", refusals
    check_spec(case, fast.sites[0])


def check_spec(case: Case, site: attnopt.Site) -> None:
    s = case.s
    assert site.num_heads == s.heads
    assert site.num_kv_heads == s.kv_heads
    assert site.spec.kv_of_head == s.kv_of_head
    assert (site.head_dim, site.value_dim) == (s.head_dim, s.value_dim)
    assert site.is_cross == s.cross
    assert site.spec.has_sinks == s.sinks
    assert site.spec.softcap == pytest.approx(s.softcap) if s.softcap else site.spec.softcap is None
    expected = case.model.expected_projections()
    for role, want in expected.items():
        found = site.projections[role]
        if found.rows is None:
            assert found.why
            continue
        assert {"weight": found.weight, "transposed": found.transposed, "rows": found.rows} == {
            k: want[k] for k in ("weight", "transposed", "rows")
        }, role
        assert found.bias in (None, want["bias"])


@PROPERTY
@given(spellings(), st.integers(0, 4), st.integers(0, 3), st.integers(0, 2), st.integers(1, 2))
def test_properties_window_is_the_oracle(s: Spelling, left: int, right: int, sinks: int, dilation: int) -> None:
    case = Case.of(s)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(case.given.get("memory", case.given["x"]).shape[1])[None, :]
    step = j - i
    near = (step >= -left * dilation) & (step <= right * dilation) & (step % dilation == 0)
    check(case, LocalWindow(left, right, sinks, dilation), near | (j < sinks), {})


PATTERNS: list[Pattern] = [
    Window(1, 0),
    Causal(),
    Sinks(1) | Window(1),
    Strided(2),
    Window(2, 1) & Strided(2) | Sinks(2),
]


@PROPERTY
@given(spellings(), st.sampled_from(PATTERNS), st.integers(0, 7))
def test_properties_sparse_is_the_oracle(s: Spelling, pattern: Pattern, only: int) -> None:
    """``only``: the pattern is for one head alone, where there is such a head."""
    case = Case.of(s)
    kv_len = case.given.get("memory", case.given["x"]).shape[1]
    mask = pattern.mask(LENGTH, kv_len)[0]
    if only >= s.heads:
        check(case, Sparse(pattern), mask, {})
        return
    visible = torch.ones(s.heads, LENGTH, kv_len, dtype=torch.bool)
    visible[only] = mask
    check(case, Sparse(attnopt.patterns.PerHead({only: pattern})), visible, {})


@PROPERTY
@given(spellings(), st.data())
def test_properties_pruning_is_the_oracle_and_removes_weights(s: Spelling, data: st.DataObject) -> None:
    case = Case.of(s)
    heads = data.draw(st.sets(st.integers(0, s.heads - 1), min_size=1, max_size=max(1, s.heads - 1)))
    check(case, PruneHeads(heads=sorted(heads)), None, dict.fromkeys(heads, 0.0))
    fast = case.optimized(PruneHeads(heads=sorted(heads)))
    if not fast.sites or fast.report.sites[0].status != "rewritten":
        return
    kept = [h for h in range(s.heads) if h not in heads]
    assert fast.sites[0].spec.heads == tuple(kept)
    kv_kept = len({s.kv_of_head[h] for h in kept})
    rows = {
        "q": len(kept) * s.head_dim,
        "k": kv_kept * s.head_dim,
        "v": kv_kept * s.value_dim,
        "out": len(kept) * s.value_dim,
    }
    before = sum(p.numel() for p in case.model.parameters())
    after = sum(p.numel() for p in fast.parameters())
    sizes = {
        "q": s.heads * s.head_dim,
        "k": s.kv_heads * s.head_dim,
        "v": s.kv_heads * s.value_dim,
        "out": s.heads * s.value_dim,
    }
    known = [r for r in sizes if fast.sites[0].projections[r].rows is not None]
    gone = sum((sizes[r] - rows[r]) * s.width for r in known)
    assert before - after >= gone, (
        f"{before} parameters before and {after} after; {gone} of them belong to pruned heads"
    )


@pytest.mark.parametrize("core", ["matmul", "sdpa", "bmm"])
def test_a_single_head_is_no_batch(core: str) -> None:
    """Scores [B, 1, L, S]: the first head is not the first sequence of the batch."""
    case = Case.of(Spelling(heads=1, kv_heads=1, core=core))
    check(case, ScaleHeads({0: 2.0}), None, {0: 2.0})
    for policy in (PruneHeads(heads=[0]), PruneHeads(heads=[1]), ScaleHeads({1: 2.0})):
        fast = case.optimized(policy)
        assert fast.report.sites[0].status == "refused"
        oracle.assert_same(oracle.run(fast, (), case.given), case.own())


@pytest.mark.parametrize("core", ["bmm", "baddbmm"])
def test_heads_behind_a_norm_across_them(core: str) -> None:
    """Scores [B*H, L, S], and queries whose heads a norm hides: the values still tell them apart."""
    case = Case.of(Spelling(core=core, norm="across"))
    check(case, ScaleHeads({0: 2.0}), None, {0: 2.0})
    check(case, PruneHeads(heads=[1]), None, {1: 0.0})


@PROPERTY
@given(spellings(), st.data())
def test_properties_gains_are_the_oracle(s: Spelling, data: st.DataObject) -> None:
    gains = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=s.heads, max_size=s.heads))
    check(Case.of(s), ScaleHeads(gains), None, dict(enumerate(gains)))


@PROPERTY
@given(spellings().filter(lambda s: s.kv_heads > 1), st.sampled_from(["mean", "first"]))
def test_properties_grouping_equal_heads_changes_nothing(s: Spelling, merge: str) -> None:
    if s.norm == "across":
        s = replace(s, norm="")
    target = max(n for n in range(1, s.kv_heads) if s.kv_heads % n == 0)
    size = s.kv_heads // target
    case = Case.of(s, equal={g: g // size * size for g in range(s.kv_heads)})
    check(case, GroupedQuery(kv_heads=target, merge=merge), None, {})


@PROPERTY
@given(spellings().filter(lambda s: s.heads > 1), st.integers(0, 3), st.booleans(), st.data())
def test_properties_passes_compose_in_both_orders(
    s: Spelling, left: int, also_gains: bool, data: st.DataObject
) -> None:
    case = Case.of(s)
    head = data.draw(st.integers(0, s.heads - 1))
    window, prune = LocalWindow(left, 1), PruneHeads(heads=[head])
    other = (head + 1) % s.heads
    scale = [ScaleHeads({other: 2.0})] if also_gains else []
    step = torch.arange(case.given.get("memory", case.given["x"]).shape[1])[None, :] - torch.arange(LENGTH)[:, None]
    visible = (step >= -left) & (step <= 1)
    gains = {head: 0.0, **({other: 2.0} if also_gains else {})}
    assume(case.leaves_each_query_a_key(visible))
    outputs = []
    for policy in ([window, prune, *scale], [*scale, prune, window]):
        fast = case.optimized(policy)
        outputs.append(oracle.run(fast, (), case.given))
        if not is_site(case, fast):
            continue
        refusals = fast.report.sites[0].refusals
        assert set(refusals) <= {"local-window"}, refusals
        assert s.cross == ("local-window" in refusals)
        oracle.assert_same(outputs[-1], case.meant(None if refusals else visible, gains), str(policy))
    oracle.assert_same(outputs[0], outputs[1], "the order of the passes")


# ---------------------------------------------------------------- read-off of spellings that must match
CAUSAL = "Causal()"
MUST_MATCH: list[tuple[Spelling, dict[str, Any]]] = [
    (Spelling(), {"scale": 0.5}),
    (Spelling(heads=3, kv_heads=3, head_dim=5, value_dim=2, width=11), {"scale": 5**-0.5}),
    (Spelling(packing="fused", order="qkv", unpack="chunk"), {"scale": 0.5}),
    (Spelling(packing="fused", order="qvk", unpack="split", value_dim=3), {"scale": 0.5}),
    (Spelling(packing="fused", order="kqv", unpack="slice", value_dim=3, kv_heads=2), {"scale": 0.5}),
    (Spelling(packing="fused", order="vqk", unpack="unbind"), {"scale": 0.5}),
    (Spelling(packing="fused", order="qkv", unpack="select", op="addmm"), {"scale": 0.5}),
    (Spelling(packing="fused", order="qkv", unpack="unbind", op="conv1d"), {"scale": 0.5}),
    (Spelling(packing="fused", order="qvk", unpack="chunk", op="conv2d"), {"scale": 0.5}),
    (Spelling(packing="fused", order="qkv", unpack="split", op="parameter", bias=False), {"scale": 0.5}),
    (Spelling(packing="kv", order="qvk", unpack="chunk", cross=True), {"scale": 0.5}),
    (Spelling(packing="per-head", order="qkv", unpack="split", value_dim=3), {"scale": 0.5}),
    (Spelling(packing="per-head", order="qvk", unpack="unbind"), {"scale": 0.5}),
    (Spelling(packing="per-head", order="qkv", unpack="chunk", op="addmm"), {"scale": 0.5}),
    (Spelling(packing="per-group", heads=6, kv_heads=2), {"scale": 0.5}),
    (Spelling(packing="per-group", heads=6, kv_heads=3, op="parameter"), {"scale": 0.5}),
    (Spelling(packing="per-group", heads=6, kv_heads=1, core="grouped"), {"scale": 0.5}),
    (Spelling(op="addmm", core="bmm", mask=("causal",)), {"scale": 0.5, "pattern": CAUSAL}),
    (Spelling(core="baddbmm", scale="alpha"), {"scale": 0.5}),
    (Spelling(core="baddbmm", scale="alpha", bias_kind="addend"), {"scale": 0.5, "has_bias": True}),
    (Spelling(core="einsum", scale="q"), {}),
    (Spelling(core="heads-last", scale="k"), {}),
    (Spelling(core="channels", scale="div"), {"scale": 0.5}),
    (Spelling(core="transposed", mask=("causal",)), {"scale": 0.5, "pattern": CAUSAL}),
    (Spelling(core="mulsum"), {"scale": 0.5}),
    (Spelling(core="sdpa", mask=("causal",)), {"scale": 0.5, "pattern": CAUSAL}),
    (Spelling(core="sdpa", heads=6, kv_heads=2, share="enable_gqa", scale="none"), {"scale": 1.0}),
    (Spelling(core="sdpa", mask=("causal",), apply="add-inf"), {"scale": 0.5, "pattern": CAUSAL}),
    (Spelling(heads=6, kv_heads=2, share="repeat_interleave"), {"scale": 0.5}),
    (Spelling(heads=6, kv_heads=2, share="expand"), {"scale": 0.5}),
    (Spelling(heads=6, kv_heads=2, share="tiled"), {"scale": 0.5}),
    (Spelling(heads=4, kv_heads=2, share="tiled"), {"scale": 0.5}),
    (Spelling(heads=6, kv_heads=2, share="tiled", core="sdpa"), {"scale": 0.5}),
    (Spelling(heads=4, kv_heads=1, share="broadcast"), {"scale": 0.5}),
    (Spelling(heads=6, kv_heads=2, core="grouped"), {"scale": 0.5}),
    (Spelling(heads=6, kv_heads=3, core="grouped-einsum", mask=("causal",)), {"scale": 0.5, "pattern": CAUSAL}),
    (Spelling(mask=("causal",), made="triu", apply="masked_fill"), {"pattern": CAUSAL}),
    (Spelling(mask=("causal",), made="arange", apply="where", commuted=True), {"pattern": CAUSAL}),
    (Spelling(mask=("causal",), made="tril", apply="add-inf", commuted=True), {"pattern": CAUSAL}),
    (Spelling(mask=("causal",), made="tril", apply="add-min"), {"pattern": CAUSAL}),
    (Spelling(mask=("causal",), made="tril", apply="lerp"), {"pattern": CAUSAL}),
    (Spelling(mask=("causal",), made="tril", apply="old-gpt"), {"pattern": CAUSAL}),
    (Spelling(mask=("window",), apply="masked_fill"), {"pattern": "Window(left=2, right=2)"}),
    (Spelling(mask=("left",), apply="add-min"), {"pattern": "Window(left=2, right=0)"}),
    (Spelling(mask=("causal", "window"), apply="where"), {"pattern": "Window(left=2, right=0)"}),
    (Spelling(mask=("padding",), apply="masked_fill"), {"pattern": "Full()", "has_mask": True}),
    (Spelling(mask=("padding",), apply="add-min"), {"pattern": "Full()", "has_bias": True}),
    (Spelling(mask=("float-padding", "causal"), apply="where"), {}),
    (Spelling(mask=("given",), commuted=True), {"pattern": "Full()", "has_bias": True}),
    (Spelling(bias_kind="alibi", mask=("causal",)), {"pattern": CAUSAL, "has_bias": True}),
    (Spelling(bias_kind="table"), {"pattern": "Full()", "has_bias": True}),
    (Spelling(softcap=5.0, mask=("causal",)), {"softcap": 5.0, "pattern": CAUSAL, "scale": 0.5}),
    (Spelling(sinks=True, mask=("causal",)), {"has_sinks": True, "pattern": CAUSAL}),
    (Spelling(rope="half", scale="q"), {"positions": ("rope",)}),
    (Spelling(rope="interleaved", kv_heads=2), {"positions": ("rope",)}),
    (Spelling(rope="complex"), {"positions": ("rope",)}),
    (Spelling(norm="layer"), {}),
    (Spelling(norm="rms", rope="half", kv_heads=2), {}),
    (Spelling(scale="temperature"), {"scale": 1.0}),
    (Spelling(scale="none"), {"scale": 1.0}),
    (Spelling(scale="buffer"), {"scale": 0.5}),
    (Spelling(cross=True), {"is_cross": True}),
    (Spelling(cross=True, mask=("padding",), apply="masked_fill"), {"is_cross": True}),
    (Spelling(softmax="positive"), {}),
    (Spelling(softmax="float32"), {}),
    (Spelling(softmax="upcast"), {}),
    (Spelling(softmax="exp"), {}),
    (Spelling(softmax="stable-exp"), {}),
    (Spelling(softmax="log"), {}),
    (Spelling(softmax="lse"), {}),
    (Spelling(softmax="late"), {}),
    (Spelling(op="einsum"), {}),
    (Spelling(heads=1, kv_heads=1), {"scale": 0.5}),
    (Spelling(heads=1, kv_heads=1, core="sdpa"), {"scale": 0.5}),
    (Spelling(heads=1, kv_heads=1, core="bmm"), {"scale": 0.5}),
    (Spelling(core="bmm", norm="across"), {"scale": 0.5}),
    (Spelling(packing="kv", unpack="select", op="parameter"), {"scale": 0.5}),
    (Spelling(packing="per-head", rope="complex", value_dim=3), {}),
    (Spelling(op="conv2d", rope="complex"), {}),
    (Spelling(packing="per-group"), {"scale": 0.5}),
    (Spelling(pre_norm=True, residual=True, dropout=True), {"scale": 0.5}),
]


def described(s: Spelling) -> str:
    plain = Spelling()
    return ",".join(f"{k}={v}" for k, v in vars(s).items() if getattr(plain, k) != v) or "plain"


@pytest.mark.parametrize(("s", "want"), MUST_MATCH, ids=[described(s) for s, _ in MUST_MATCH])
def test_spelling_must_match(s: Spelling, want: dict[str, Any]) -> None:
    assert s == s.repaired()
    case = Case.of(s)
    found = attnopt.inspect(case.model, (), case.given)
    assert [site.name for site in found.sites] == [""], [str(n.refusal) for n in found.near_misses]
    (site,) = found.sites
    check_spec(case, site)
    for name, value in want.items():
        got = getattr(site.spec, name)
        assert (str(got) if name == "pattern" else got) == (
            pytest.approx(value) if isinstance(value, float) else value
        ), name
    if s.op != "einsum" and s.norm != "across":  # where rows cannot be told, ``why`` is enough
        expected = case.model.expected_projections()
        read = {
            role: {"weight": p.weight, "bias": p.bias, "transposed": p.transposed, "rows": p.rows}
            for role, p in site.projections.items()
        }
        if s.op == "parameter":  # the bias may be added by an operator of its own
            for role in expected:
                assert read[role].pop("bias") in (None, expected[role].pop("bias"))
        assert read == expected


def test_returned_weights_are_seen_and_refused() -> None:
    case = Case.of(Spelling(returns="weights"))
    fast = case.optimized(PruneHeads(heads=[0]))
    (entry,) = fast.report.sites
    assert entry.status == "refused"
    assert entry.refusals["prune-heads"].code == "escapes"
    oracle.assert_same(oracle.run(fast, (), case.given), case.own(), "returned weights", limit=0.0)
