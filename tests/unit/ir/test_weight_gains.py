"""Gains on attention weights: against maps edited by hand, with and without the maps; log-sum-exps and their merge."""

from __future__ import annotations

import math
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
from pattern_strategies import LEAVES
from sites import a_site, refusal, wrong
from specs import PATTERNS, a_spec, tensors
from stacks import batches, stack
from torch import Tensor
from variants import mostly_slow

import attnopt
from attnopt.backends import Blocked, Reference, Sdpa, block_gather, flex
from attnopt.backends.attention_operator import attention_with_lse
from attnopt.errors import PolicyError
from attnopt.ir import plugin_calls
from attnopt.ir.lse_merge import merged_by_lse
from attnopt.ir.operands import OperandTensors
from attnopt.ir.reference import reference_with_lse
from attnopt.ir.weight_gains import Part, WeightGains
from attnopt.passes import Fuse, LocalWindow, PruneHeads, SegmentGain, Sparse
from attnopt.patterns import Causal, Full, Keys, PerHead, Sinks, Window

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
Map = Callable[[Tensor], Tensor]


def among(positions: Any, length: int) -> Tensor:
    """Bool [S]: which keys are at these positions."""
    seen = torch.zeros(length, dtype=torch.bool)
    seen[[p for p in positions if p < length]] = True
    return seen


def edited(
    p: Tensor, g: Tensor, normalise: str, to: Tensor | None = None, mass: float = 0.0, share: float = 1.0
) -> Tensor:
    """The weights ``p`` [..., L, S] with gains ``g``, 1 outside segments, as the papers write it: row by row, with a map."""
    changed = g != 1
    if normalise == "none":
        return p * g
    if normalise == "logits":
        return p * g / (1 - p.sum(-1, keepdim=True) + (p * g).sum(-1, keepdim=True)).clamp_min(1e-30)
    assert to is not None
    held = torch.where(changed, p, 0.0).sum(-1, keepdim=True)
    received = torch.where(to & ~changed, p, 0.0).sum(-1, keepdim=True)
    freed = torch.where(changed, (1 - g) * p, 0.0).sum(-1, keepdim=True)
    is_on = (held + received >= mass) & (held <= share * (held + received)) & (received > 0)
    moved = torch.where(to & ~changed, p * (1 + freed / received), p * g)
    return torch.where(is_on, moved, p)


# ---------------------------------------------------------------- the operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [*PATTERNS, Causal() & ~Sinks(70)], ids=str)
def test_law_log_sum_exps_are_those_of_the_scores(pattern: attnopt.Pattern, dtype: torch.dtype) -> None:
    spec = a_spec(kv_of_head=(0, 0, 1, 1), pattern=pattern, has_bias=True, has_mask=True, has_sinks=True, softcap=5.0)
    t = tensors(spec, 2, 70, 131, dtype, seed=1)
    scores = spec.scale * t["q"].double() @ t["k"].double().repeat_interleave(2, 1).mT  # type: ignore[union-attr]
    scores = 5.0 * torch.tanh(scores / 5.0) + t["bias"].double()  # type: ignore[union-attr]
    seen = t["mask"] & pattern.mask(70, 131, num_heads=4)[None]
    rows = torch.cat([scores.masked_fill(~seen, -torch.inf), t["sinks"].double().expand(2, 4, 70, 1)], -1)  # type: ignore[union-attr]
    want = rows.logsumexp(-1)
    options = (pattern.to_json(), spec.kv_of_head, spec.scale, spec.softcap)
    o, top, log_sum = attention_with_lse(*t.values(), *options)
    lse = top + log_sum
    assert top.dtype == log_sum.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), want, atol=2e-2 if dtype == torch.bfloat16 else 2e-6, rtol=1e-5)
    torch.testing.assert_close(o, torch.ops.attnopt.attention(*t.values(), *options), atol=1e-2, rtol=1e-2)
    operands = OperandTensors(**t)  # type: ignore[arg-type]
    for way in (block_gather, flex):
        if way is flex and dtype == torch.bfloat16:
            continue  # FlexAttention on a CPU rounds scores to bfloat16
        _, top, log_sum = way.attend_with_lse(spec, operands)
        torch.testing.assert_close((top + log_sum).double(), lse.double(), atol=1e-2, rtol=1e-4)


def test_a_row_without_keys_has_a_log_sum_exp_of_minus_infinity() -> None:
    spec = a_spec(pattern=Window(2, 0) & ~Sinks(3))
    t = tensors(spec, 2, 9, 9, torch.float64, seed=0)
    for _, top, log_sum in (
        attention_with_lse(*t.values(), spec.pattern.to_json(), spec.kv_of_head, spec.scale, None),
        reference_with_lse(spec)(t["q"], t["k"], t["v"], bias=None, mask=None, sinks=None),  # type: ignore[arg-type]
    ):
        assert (top[:, :, :3] == -torch.inf).all()
        assert (log_sum[:, :, :3] == 0).all()
        assert top[:, :, 3:].isfinite().all()


@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("normalise", ["none", "logits"])
def test_rows_that_see_hidden_keys_alone(hidden: float, normalise: Any) -> None:
    """A finite number hides every key of a padded query: their weights are equal, and parts count by their keys."""
    gains = WeightGains((Part(Keys([0, 1, 4]), (0.5,) * 4),), normalise)
    spec = a_spec(has_bias=True, pattern=Causal(), weight_gains=gains)
    t = tensors(spec, 2, 9, 9, torch.float32, seed=0)
    t["bias"] = torch.zeros(2, 1, 1, 9)
    t["bias"][:, :, :, :6] = hidden
    q, k, v, bias = (t[n] for n in ("q", "k", "v", "bias"))
    p = (spec.scale * q @ k.mT + bias).masked_fill(~Causal().mask(9, 9)[None], -torch.inf).softmax(-1)  # type: ignore[union-attr, operator]
    want = edited(p, torch.where(among([0, 1, 4], 9), 0.5, 1.0), normalise) @ v
    for backend in (Blocked(), Reference()):
        made = backend.lower(spec)(q, k, v, bias=bias, mask=None, sinks=None)  # type: ignore[arg-type]
        torch.testing.assert_close(made, want, atol=2e-5 if hidden > -1e5 else 1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_law_gradients_of_outputs_and_log_sum_exps(dtype: torch.dtype) -> None:
    spec = a_spec(kv_of_head=(0, 1, 1, 0), pattern=Causal() & ~Sinks(2), has_bias=True, has_sinks=True)
    t = {n: x if x is None else x.requires_grad_() for n, x in tensors(spec, 2, 70, 90, dtype, seed=3).items()}
    made = attention_with_lse(*t.values(), spec.pattern.to_json(), spec.kv_of_head, spec.scale, None)
    want = reference_with_lse(spec)(t["q"], t["k"], t["v"], bias=t["bias"], mask=None, sinks=t["sinks"])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    made, want = (made[0], made[2]), (want[0], want[2])
    grads = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in want]
    leaves = [x for x in t.values() if x is not None]
    for ours, theirs in zip(
        torch.autograd.grad(made, leaves, grads), torch.autograd.grad(want, leaves, grads), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.library.opcheck(
        torch.ops.attnopt.attention_with_lse.default,
        (*t.values(), spec.pattern.to_json(), spec.kv_of_head, spec.scale, None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


# ---------------------------------------------------------------- specs
@st.composite
def gains(draw: st.DrawFn) -> WeightGains:
    normalise = draw(st.sampled_from(("logits", "none", "redistribute")))
    most = 1.0 if normalise == "redistribute" else 4.0
    count = draw(st.integers(1, 2))
    found = [
        Part(draw(st.builds(Keys, st.sets(st.integers(0, 80), min_size=1, max_size=5)) | LEAVES),
             tuple(draw(st.lists(st.floats(0.0625, most), min_size=4, max_size=4))))
        for _ in range(count)
    ]  # fmt: skip
    to = draw(st.builds(Keys, st.sets(st.integers(0, 80), max_size=30))) if normalise == "redistribute" else None
    return WeightGains(tuple(found), normalise, to)


@settings(max_examples=40, deadline=None)
@given(gains(), st.booleans(), st.booleans(), st.sampled_from([Full(), Causal(), Window(9, 3)]))
def test_law_merged_parts_are_the_edited_map(
    found: WeightGains, masked: bool, sinks: bool, pattern: attnopt.Pattern
) -> None:
    L, S = 75, 83
    spec = a_spec(pattern=pattern, has_mask=masked, has_sinks=sinks, weight_gains=found)
    t = tensors(spec, 2, L, S, torch.float64, seed=2)
    q, k, v, others = t["q"], t["k"], t["v"], {n: t[n] for n in ("bias", "mask", "sinks")}
    assert q is not None
    assert k is not None
    assert v is not None
    seen = pattern.mask(L, S)[None]
    seen = seen if t["mask"] is None else seen & t["mask"]
    rows = (spec.scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    column = torch.full((2, 4, L, 1), -torch.inf).double() if t["sinks"] is None else t["sinks"].expand(2, 4, L, 1)
    p = torch.cat([rows, column], -1).softmax(-1).nan_to_num(0.0)[..., :-1]
    g, taken = torch.ones_like(p), torch.zeros_like(seen.expand(p.shape))
    for part in found.parts:
        here = part.pattern.mask(L, S, num_heads=4).expand(4, L, S)[None] & ~taken
        g = torch.where(here, torch.tensor(part.gains, dtype=torch.float64).view(1, 4, 1, 1), g)
        taken = taken | here
    to = None if found.to is None else found.to.mask(L, S)[None]
    if found.normalise == "redistribute":  # a segment of gain 1 keeps its weights, too
        assert to is not None
        to = to & ~taken
    want = edited(p, torch.where(taken & (g == 1), 1.0, g), found.normalise, to) @ v
    if not masked:
        want = torch.where(seen.any(-1, keepdim=True), want, 0.0)
    for backend in (Blocked(), Reference()):
        made = backend.lower(spec)(q, k, v, **others)
        torch.testing.assert_close(made, want, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("pattern", [Full(), Causal()], ids=str)
def test_law_a_gain_of_n_is_n_copies_of_the_keys(pattern: attnopt.Pattern) -> None:
    L, S, keys = 40, 66, [0, 7, 65]
    spec = a_spec(pattern=Full(), weight_gains=WeightGains((Part(Keys(keys), (3.0,) * 4),)))
    t = tensors(spec, 2, L, S, torch.float64, seed=4)
    hidden = ~pattern.mask(L, S)[None]
    twice = [*range(S), *keys, *keys]
    bare = replace(spec, weight_gains=None, has_mask=True)
    copied = Reference().lower(bare)(
        t["q"], t["k"][:, :, twice], t["v"][:, :, twice], bias=None, mask=~hidden[..., twice], sinks=None  # type: ignore[index, arg-type]
    )  # fmt: skip
    made = Blocked().lower(replace(spec, pattern=pattern))(t["q"], t["k"], t["v"], bias=None, mask=None, sinks=None)  # type: ignore[arg-type]
    torch.testing.assert_close(made, copied, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_receivers_of_hardly_any_weight(dtype: torch.dtype) -> None:
    """What is freed may be 1e38 times as much as what the receivers hold."""
    found = WeightGains((Part(Keys([0]), (0.25,) * 4),), "redistribute", Keys([1, 2]))
    spec = a_spec(scale=1.0, weight_gains=found)
    q = torch.ones(1, 4, 3, 8, dtype=dtype)
    k = torch.zeros(1, 4, 5, 8, dtype=dtype)
    k[:, :, 0], k[:, :, 1] = 11.25, 0.125  # scores of 90, 1, 0, 0, 0
    v = torch.randn(1, 4, 5, 8).to(dtype)
    p = (q.double() @ k.double().mT).softmax(-1)
    want = (p[..., :1] * 0.25 + 0) * v.double()[:, :, :1]
    pair = p[..., 1:3] / p[..., 1:3].sum(-1, keepdim=True)
    want = want + 0.75 * pair @ v.double()[:, :, 1:3]
    for backend in (Blocked(), Reference()):
        made = backend.lower(spec)(q, k, v, bias=None, mask=None, sinks=None)
        torch.testing.assert_close(made.double(), want, atol=1e-2 if dtype == torch.float16 else 1e-5, rtol=1e-3)


def test_parts_holds_no_map() -> None:
    """Every tensor of the lowered graph is linear in the length."""
    model, L = stack(causal=True), 300
    p = SegmentGain(range(5, 40), 0.5, normalise="redistribute", to=range(60, 90), when={"mass": 0.1})
    fast = attnopt.optimize(model, p, (torch.randn(1, L, 16),), backend="blocked")
    sizes = [n.meta["val"].numel() for n in fast.graph_module.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert max(sizes) < L * L
    assert "attention_with_lse" in fast.graph_module.code


def test_gradients_flow_through_gains() -> None:
    spec = a_spec(weight_gains=WeightGains((Part(Keys([1, 5]), (0.5, 2.0, 1.0, 1.0)),), "none"))
    t = {n: x if x is None else x.requires_grad_() for n, x in tensors(spec, 2, 30, 30, torch.float64, seed=5).items()}
    leaves = [x for x in t.values() if x is not None]
    found = []
    for backend in (Blocked(), Reference()):
        o = backend.lower(spec)(t["q"], t["k"], t["v"], bias=None, mask=None, sinks=None)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(o.square().sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_keeping_heads_keeps_their_gains() -> None:
    found = WeightGains((Part(PerHead({0: Sinks(1), 2: Sinks(2)}), (0.1, 0.2, 0.3)),), "none")
    left = found.keeping([2, 1])
    assert left.parts[0].gains == (0.3, 0.2)
    assert left.parts[0].pattern.for_head(0) == Sinks(2)
    assert WeightGains.from_json(left.to_json()) == left


# ---------------------------------------------------------------- models
CASES: dict[str, tuple[SegmentGain, Callable[[int], Map]]] = {
    "none": (
        SegmentGain([0, 3], 0.3, normalise="none"),
        lambda S: lambda p: edited(p, torch.where(among([0, 3], S), 0.3, 1.0), "none"),
    ),
    "logits": (
        SegmentGain([range(2), "4-5"], [2.0, 0.25]),
        lambda S: lambda p: edited(
            p, torch.where(among([0, 1], S), 2.0, torch.where(among([4, 5], S), 0.25, 1.0)), "logits"
        ),
    ),
    "redistribute": (
        SegmentGain([1, 2], 0.4, normalise="redistribute", to=range(1, 6), when={"mass": 0.2, "share": 0.7}),
        lambda S: lambda p: edited(
            p, torch.where(among([1, 2], S), 0.4, 1.0), "redistribute", among(range(1, 6), S), 0.2, 0.7
        ),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["roberta", "qwen3", "mbart", "mt5", "deit"])
def test_law_models_with_gains(name: str, case: str) -> None:
    model, args, kwargs = zoo.BY_NAME[name].build()
    p, change = CASES[case]
    fast = attnopt.optimize(model, p, args, kwargs)
    assert all(s.status == "rewritten" for s in fast.report.sites), fast.report

    def edit(_: int, shape: tuple[int, ...]) -> oracle.Edit:
        return oracle.Edit(weights=change(shape[-1]))

    want = oracle.run_edited(model, args, kwargs, edit)
    oracle.assert_same(oracle.run(fast, args, kwargs), want)
    oracle.assert_differs(want, oracle.run(model, args, kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_gains_at_other_lengths_in_onnx_and_after_saving(case: str, backend: str, tmp_path: Path) -> None:
    model, (p, change) = stack(), CASES[case]
    fast = attnopt.optimize(model, p, (torch.randn(2, 12, 16),), dynamic_shapes="auto", backend=backend)
    fast.export_onnx(tmp_path / "model.onnx")
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert [s.spec for s in loaded.sites] == [s.spec for s in fast.sites]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch, length in ((2, 12), (3, 75), (1, 6)):
        x = torch.randn(batch, length, 16)
        want = oracle.run_edited(model, (x,), {}, lambda _, s: oracle.Edit(weights=change(s[-1])))
        oracle.assert_same(oracle.run(fast, (x,)), want)
        oracle.assert_same(oracle.run(loaded, (x,)), oracle.run(fast, (x,)), limit=0.0)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        oracle.assert_same([torch.from_numpy(got)], want)


def test_gains_of_some_heads_beside_other_passes() -> None:
    model, x = stack(), batches()[0]
    policy = [SegmentGain([0, 4], 0.25, heads=[1, 3], normalise="none"), LocalWindow(6), PruneHeads(heads=[0])]

    def change(p: Tensor) -> Tensor:
        g = torch.ones(4, 1, p.shape[-1])
        g[[1, 3]] = torch.where(among([0, 4], p.shape[-1]), 0.25, 1.0)
        return p * g

    step = torch.arange(12)[None] - torch.arange(12)[:, None]
    want = oracle.run_edited(
        model, (x,), {},
        lambda *_: oracle.Edit(visible=(step >= -6) & (step <= 0), gains=(0.0, 1.0, 1.0, 1.0), weights=change),
    )  # fmt: skip
    for found in (policy, policy[::-1]):
        fast = attnopt.optimize(model, found, (x,))
        oracle.assert_same(oracle.run(fast, (x,)), want)


def test_laws_of_gains_1_and_0() -> None:
    model, x = stack(), batches()[0]
    same = attnopt.optimize(model, SegmentGain([0, 4], 1.0), (x,))
    assert all(s.spec == f.spec for s, f in zip(same.sites, attnopt.optimize(model, Fuse(), (x,)).sites, strict=True))
    without = attnopt.optimize(model, SegmentGain([3, 4], 0.0), (x,))
    assert [s.spec for s in without.sites] == [
        s.spec for s in attnopt.optimize(model, Sparse(~Keys([3, 4])), (x,)).sites
    ]
    some = attnopt.optimize(model, SegmentGain([3, 4], 0.0, heads=[2]), (x,))
    assert [s.spec for s in some.sites] == [
        s.spec for s in attnopt.optimize(model, Sparse(PerHead({(2,): ~Keys([3, 4])})), (x,)).sites
    ]
    pruned = attnopt.optimize(model, [PruneHeads(heads=[2]), SegmentGain([3], 2.0, heads=[2])], (x,))
    assert all(s.spec.weight_gains is None for s in pruned.sites)


def test_a_part_of_a_segment_may_hold_no_key() -> None:
    """A pattern may have an empty ``Keys`` in it, which holds no position that the sequence could lack."""
    model, x = stack(), batches()[0]
    for segment in (Keys(()) | Keys([1]), Keys([1]) & ~Keys(())):
        fast = attnopt.optimize(model, SegmentGain(segment, 0.25), (x,))
        same = attnopt.optimize(model, SegmentGain([1], 0.25), (x,))
        oracle.assert_same(oracle.run(fast, (x,)), oracle.run(same, (x,)))
        oracle.assert_differs(oracle.run(fast, (x,)), oracle.run(model, (x,)))
    none = attnopt.optimize(model, SegmentGain(PerHead({0: Keys(())}), 0.25), (x,), dynamic_shapes="auto")
    oracle.assert_same(oracle.run(none, (x,)), oracle.run(model, (x,)))


def test_earlier_segments_count_first() -> None:
    model, x = stack(), batches()[0]
    for segments, of_keys in (([[0, 1], [1, 2]], {0: 2.0, 1: 2.0, 2: 0.0}), ([[3], "0-11"], {3: 1.0})):
        rest = 1.0 if len(of_keys) > 1 else 0.0
        g = torch.tensor([of_keys.get(j, rest) for j in range(12)])
        fast = attnopt.optimize(model, SegmentGain(segments, [of_keys[min(of_keys)], 0.0]), (x,))

        def change(p: Tensor, g: Tensor = g) -> Tensor:
            return (p * g / (p * g).sum(-1, keepdim=True)).nan_to_num(0.0)

        oracle.assert_same(
            oracle.run(fast, (x,)), oracle.run_edited(model, (x,), {}, lambda *_, c=change: oracle.Edit(weights=c))
        )


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_conditions_at_the_ends_of_their_range(backend: str) -> None:
    model, x = stack(), batches()[0]
    every = SegmentGain([range(4), range(4, 12)], [0.5, 0.25], normalise="none", when={"mass": 1.0})
    plain = replace_when(every)
    a, b = (attnopt.optimize(model, p, (x,), backend=backend) for p in (every, plain))
    oracle.assert_same(oracle.run(a, (x,)), oracle.run(b, (x,)))


def replace_when(p: SegmentGain) -> SegmentGain:
    """Without its condition."""
    return SegmentGain(p.segments, p.gains, p.heads, p.normalise, p.to)


def test_gains_keep_double_precision() -> None:
    model, x = stack().double(), batches()[0].double()
    p = SegmentGain([0, 1], 0.3, normalise="redistribute", to=[2, 3], when={"mass": 0.01})
    a, b = (attnopt.optimize(model, p, (x,), backend=name) for name in ("blocked", "reference"))
    oracle.assert_same(oracle.run(a, (x,)), oracle.run(b, (x,)), limit=1e-12)

    def change(w: Tensor) -> Tensor:
        return edited(w, torch.where(among([0, 1], 12), torch.tensor(0.3, dtype=torch.float64), 1.0), "redistribute",
                      among([2, 3], 12), 0.01)  # fmt: skip

    oracle.assert_same(
        oracle.run(a, (x,)), oracle.run_edited(model, (x,), {}, lambda *_: oracle.Edit(weights=change)), limit=1e-12
    )


def test_optimizing_again_says_what_to_do() -> None:
    model, x = stack(), batches()[0]
    fast = attnopt.optimize(model, SegmentGain([0], 0.5), (x,), backend="blocked")
    again = attnopt.inspect(fast, (x,))
    assert {m.refusal.hint for m in again.near_misses} == {"optimize the original model with all of its passes"}


def test_decoding_needs_plain_attention(tmp_path: Path) -> None:
    """A file with a cache holds GroupQueryAttention, which knows no gains."""
    from tiny_llama import tiny_llama

    model, x = tiny_llama(4), torch.randint(0, 50, (1, 8))
    fast = attnopt.optimize(model, SegmentGain([0], 0.5), (x,), dynamic_shapes="auto")
    with pytest.raises(attnopt.ExportError, match="does not support gains on weights"):
        fast.export_decoder(tmp_path / "model.onnx", context_length=64, eos_token_id=2)
    assert not (tmp_path / "model.onnx").exists()


# ---------------------------------------------------------------- soft masks
class Soft(tiny_models.Attention):
    """Weights times a mask of 1 and ``outside``, which does not renormalise them (iLLaMA's soft causal mask)."""

    def __init__(self, outside: float = 0.4, made: str = "tril") -> None:
        super().__init__(16, 4, causal=False)
        self.outside, self.made = outside, made

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (p(x).view(B, L, 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        place = torch.arange(L)
        if self.made == "tril":
            soft = self.outside + (1 - self.outside) * torch.ones(L, L).tril()
        elif self.made == "flags":
            soft = torch.ones(L, L).tril()
        elif self.made == "band":
            soft = torch.where((place[:, None] - place).abs() < 4, 1.0, self.outside)
        else:
            soft = self.outside ** (place[:, None] - place).abs()
        weights = (q @ k.mT / 2).softmax(-1) * soft
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("made", "outside", "pattern"), [("tril", 0.25, Causal()), ("flags", 0.0, Causal()), ("band", 0.5, Window(3, 3))]
)
@pytest.mark.parametrize("dynamic", mostly_slow([None, "auto"], None))
def test_soft_masks_are_read(
    made: str, outside: float, pattern: attnopt.Pattern, dynamic: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Soft(outside, made).eval(), torch.randn(2, 90, 16)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes=dynamic, backend="blocked")
    (site,) = fast.sites
    assert site.spec.weight_gains == WeightGains((Part(~pattern, (outside,) * 4),), "none")
    fast.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for y in (x, torch.randn(3, 131, 16), torch.randn(1, 5, 16)) if dynamic else (x,):
        oracle.assert_same(oracle.run(fast, (y,)), oracle.run(model, (y,)))
        (got,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        oracle.assert_same([torch.from_numpy(got)], oracle.run(model, (y,)))


def test_other_factors_on_weights_are_left_alone() -> None:
    found = attnopt.inspect(Soft(0.9, "decay").eval(), (torch.randn(2, 9, 16),))
    assert [miss.refusal.code for miss in found.near_misses] == ["weights-changed"]
    x = torch.randn(2, 9, 16)
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        fast = attnopt.optimize(Soft(0.5).eval(), SegmentGain([0], 0.5), (x,))
    assert "[already-gained]" in str(fast.report.sites[0].refusals["segment-gain"])


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SegmentGain([0], math.nan), "gains=nan"),
        (lambda: SegmentGain([0], -1.0), "numbers from 0 to 1e+06"),
        (lambda: SegmentGain([0], 2.0, normalise="redistribute", to=[1]), "numbers from 0 to 1"),
        (lambda: SegmentGain([0], 0.5, normalise="redistribute"), "needs to="),
        (lambda: SegmentGain([0], 0.5, to=[1]), "does not use to="),
        (lambda: SegmentGain([0], [0.5, 0.5]), "expected one number or 1 of them"),
        (lambda: SegmentGain([-1], 0.5), "positions=-1"),
        (lambda: SegmentGain("3-x", 0.5), '"0-3, 7"'),
        (lambda: SegmentGain(wrong(None), 0.5), "positions"),
        (lambda: SegmentGain([0], 0.5, normalise=wrong("sum")), "normalise='sum'"),
        (lambda: SegmentGain([0], 0.5, when={"masses": 1}), "when="),
        (lambda: SegmentGain([0], 0.5, when={"mass": 2}), "fractions from 0 to 1"),
        (lambda: SegmentGain([0], 0.5, heads=[-1]), "heads"),
        (lambda: SegmentGain([0], 0.5, heads=[]), "expected at least one head"),
        (lambda: SegmentGain([], 0.5), "expected at least one key position"),
    ],
)
def test_bad_options(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert told in str(caught.value)
    assert str(caught.value).startswith(("segment-gain", "Keys"))


def test_bad_sites() -> None:
    assert "[unknown-head]" in refusal(SegmentGain([0], 0.5, heads=[9]), a_site())
    assert "[unknown-keys]" in refusal(SegmentGain([12], 0.5), a_site())
    assert SegmentGain([12], 0.5).check(a_site(is_dynamic=True)) is None
    assert "[needs-self-attention]" in refusal(SegmentGain([Window(2)], 0.5), a_site(is_cross=True))
    assert SegmentGain([0], 0.5).check(a_site(is_cross=True)) is None
    gained = a_spec(weight_gains=WeightGains((Part(Keys([0]), (0.5,) * 4),)))
    answer = plugin_calls.accepts(Sdpa(), replace(a_site(), spec=gained))
    assert answer is not None
    assert answer.code == "no-weight-gains"
    with pytest.raises(ValueError, match="receivers"):
        WeightGains((Part(Keys([0]), (0.5,)),), "redistribute")


def test_a_policy_with_segments_is_text() -> None:
    p = SegmentGain(["0-3", Window(2)], [0.5, 2.0], heads=[1], normalise="none")
    written = attnopt.Policy.of(p).to_json()
    assert attnopt.Policy.from_json(written) == attnopt.Policy.of(p)
    text = "segment-gain(segments='5-9', gains=0.5, normalise='redistribute', to='0-4', when={'mass': 0.2})"
    assert attnopt.Policy.of("segment-gain(segments=' 5-7', gains=0.5)") == attnopt.Policy.of(
        SegmentGain([5, 6, 7], 0.5)
    )
    ((_, passes),) = attnopt.Policy.of(text).rules
    assert passes == (SegmentGain(range(5, 10), 0.5, normalise="redistribute", to=range(5), when={"mass": 0.2}),)


def test_merging_a_single_part_is_the_attention_itself() -> None:
    spec = a_spec(pattern=Causal(), has_sinks=True, weight_gains=WeightGains((Part(Full(), (1.0,) * 4),), "none"))
    t = tensors(spec, 2, 9, 9, torch.float64, seed=7)
    given = (t["q"], t["k"], t["v"])
    made = merged_by_lse(spec, reference_with_lse)(*given, bias=None, mask=None, sinks=t["sinks"])  # type: ignore[arg-type]
    want = Reference().lower(replace(spec, weight_gains=None))(*given, bias=None, mask=None, sinks=t["sinks"])  # type: ignore[arg-type]
    torch.testing.assert_close(made, want)
