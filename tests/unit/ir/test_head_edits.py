"""Heads blended with their own values, replaced and silenced: against the original model with its maps or outputs edited."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import tiny_models
import torch
import zoo
from models import Attention, Spelling, inputs
from must_match import MUST_MATCH
from sites import a_site, applied, refusal, wrong
from specs import a_spec, tensors
from stacks import batches, stack
from torch import Tensor, nn

import attnopt
from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.errors import PolicyError, RewriteError
from attnopt.ir.constant import Constant, Weight
from attnopt.ir.edit_registry import edit_from_json
from attnopt.ir.head_edits import HeadEdit, Replaced, Scaled, TowardValues, constant_heads
from attnopt.ir.head_routing import Routed
from attnopt.ir.linear_attention import LinearAttention
from attnopt.ir.local_mixers import DepthwiseConv
from attnopt.ir.mixed_maps import Mixed
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.token_mixing import TokenMixing
from attnopt.passes import GroupedQuery, HeadPatch, LocalWindow, PruneHeads, ScaleHeads, SoftPAG

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
EDITABLE = [
    s for s, _ in MUST_MATCH
    if not s.cross and not s.exponentials and s.softmax != "log" and s.returns == "output" and s.heads >= 3
    and not s.after  # the oracle edits what a softmax gives, which is not yet the map
]  # fmt: skip


@contextmanager
def outputs_edited(model: nn.Module, site: attnopt.Site, edits: Mapping[int, Any]) -> Iterator[list[Tensor]]:
    """Inside, some heads' outputs are other tensors, put before the output projection of ``model`` by a hook; the list gets
    what the heads give, [B, L, H, Dv]."""
    name = site.projections["out"].weight
    assert name is not None
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].unflatten(-1, (-1, site.value_dim)).clone()
        seen.append(z.clone())
        for head, value in edits.items():
            z[..., head, :] = value
        return (z.flatten(-2),)

    handle = model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def operands(spec: attnopt.AttentionSpec, length: int = 9, seed: int = 0) -> dict[str, Any]:
    return tensors(spec, 2, length, length, torch.float64, seed)


def computed(spec: attnopt.AttentionSpec, given: dict[str, Any]) -> Tensor:
    t = dict(given)
    return attention_of(Reference(), spec)(t.pop("q"), t.pop("k"), t.pop("v"), **t)


# ---------------------------------------------------------------- toward values
@pytest.mark.parametrize("s", EDITABLE[::9], ids=str)
def test_law_soft_pag_is_the_map_moved_to_the_identity(s: Spelling) -> None:
    model, given = Attention(s), inputs(s)
    for p, own in ((SoftPAG([0, 2], 0.3), [0.3, 0.0, 0.3]), (SoftPAG(), [1.0] * s.heads)):
        fast = attnopt.optimize(model, p, (), given)
        us = (*own, *[0.0] * s.heads)[: s.heads]
        want = oracle.run_edited(model, (), given, {0: oracle.Edit(own=us)}, heads=s.heads)
        oracle.assert_same(oracle.run(fast, (), given), want)
        oracle.assert_differs(want, oracle.run(model, (), given))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "mbart"])
def test_law_soft_pag_in_models(name: str) -> None:
    model, args, kwargs = zoo.BY_NAME[name].build()
    passes = [SoftPAG([1, 2], 0.4), ScaleHeads([1, 2, 1, 1])]
    fast = attnopt.optimize(model, passes, args, kwargs)
    refused = [("soft-pag" in s.refusals) for s in fast.report.sites]
    assert refused == [s.is_cross for s in fast.sites]

    def edit(n: int, _: tuple[int, ...]) -> oracle.Edit:
        return oracle.Edit(own=None if refused[n] else (0.0, 0.4, 0.4, 0.0), gains=(1.0, 2.0, 1.0, 1.0))

    want = oracle.run_edited(model, args, kwargs, edit)
    oracle.assert_same(oracle.run(fast, args, kwargs), want)
    oracle.assert_differs(want, oracle.run(model, args, kwargs))
    exact = attnopt.optimize(model, SoftPAG(u=0.0), args, kwargs)
    oracle.assert_same(oracle.run(exact, args, kwargs), oracle.run(model, args, kwargs))
    assert all(s.spec.after == () for s in exact.sites)


def test_toward_values_by_hand() -> None:
    spec = a_spec(kv_of_head=(0, 0, 1, 1))
    t = operands(spec)
    own, v = computed(spec, t), t["v"].repeat_interleave(2, 1)
    for u in (0.0, 0.25, 1.0):
        found = computed(spec.followed_by(TowardValues(((1, u), (3, u)))), t)
        torch.testing.assert_close(found[:, [1, 3]], ((1 - u) * own + u * v)[:, [1, 3]])
        assert torch.equal(found[:, [0, 2]], own[:, [0, 2]])
    assert torch.equal(found[:, [1, 3]], v[:, [1, 3]])
    with pytest.raises(RuntimeError, match="shape"):
        computed(spec.followed_by(TowardValues(((1, 0.5),))), {**t, "k": t["k"][:, :, :1], "v": t["v"][:, :, :1]})


def test_gains_before_and_after_an_edit() -> None:
    spec = a_spec()
    t = operands(spec)
    own, v, gains = computed(spec, t), t["v"], torch.tensor([2.0, 3.0, 0.0, 1.0]).reshape(1, 4, 1, 1).double()
    before = spec.scaled(dict(enumerate(gains.flatten().tolist()))).followed_by(TowardValues(((1, 0.5), (2, 0.5))))
    assert before.gains == {0: 2.0}
    want = own * gains
    want[:, 1:3] = 0.5 * want[:, 1:3] + 0.5 * v[:, 1:3]
    torch.testing.assert_close(computed(before, t), want)
    torch.testing.assert_close(computed(before.scaled({2: 4.0}), t), want * torch.tensor([1, 1, 4, 1])[:, None, None])


# ---------------------------------------------------------------- replaced
@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit", "starcoder2"])
def test_law_patched_heads_give_what_a_hook_gives(name: str, tmp_path: Path) -> None:
    model, args, kwargs = zoo.BY_NAME[name].build()
    site = attnopt.inspect(model, args, kwargs).sites[1]
    other = {**kwargs} if kwargs else {}
    others = tuple(a.roll(1, -1) for a in args)
    with outputs_edited(model, site, {}) as seen:
        oracle.run(model, others, other)
    recorded = seen[0]  # [B, L, H, Dv] of another run
    chosen = recorded[:, :, [3, 1]].transpose(1, 2)
    constants = torch.randn(2, site.value_dim, generator=torch.Generator().manual_seed(5))
    for values, want in (
        (chosen, {3: recorded[:, :, 3], 1: recorded[:, :, 1]}),
        (constants, {3: constants[0], 1: constants[1]}),
        ("silence", {3: 0.0, 1: 0.0}),
    ):
        fast = attnopt.optimize(model, {site.name: HeadPatch([3, 1], values)}, args, kwargs)
        with outputs_edited(model, site, want):
            meant = oracle.run(model, args, kwargs)
        oracle.assert_same(oracle.run(fast, args, kwargs), meant)
        oracle.assert_differs(meant, oracle.run(model, args, kwargs))
        if values == "silence":
            continue
        fast.save(tmp_path / "saved")
        again = attnopt.load(tmp_path / "saved")
        oracle.assert_same(oracle.run(again, args, kwargs), oracle.run(fast, args, kwargs), limit=0.0)
        assert [s.spec for s in again.sites] == [s.spec for s in fast.sites]


def test_silence_is_a_gain_of_zero_and_is_pruned_when_lowered() -> None:
    s = Spelling()
    model, given = Attention(s), inputs(s)
    silent, scaled, pruned = (
        attnopt.optimize(model, p, (), given)
        for p in (HeadPatch([1, 2]), ScaleHeads({1: 0.0, 2: 0.0}), PruneHeads(heads=[1, 2]))
    )
    oracle.assert_same(oracle.run(silent, (), given), oracle.run(scaled, (), given))
    assert sum(p.numel() for p in silent.parameters()) == sum(p.numel() for p in pruned.parameters())
    assert silent.sites[0].num_heads == 4
    nothing = attnopt.optimize(model, HeadPatch([0, 1, 2, 3]), (), given)
    oracle.assert_same(
        oracle.run(nothing, (), given), oracle.run_edited(model, (), given, {0: oracle.Edit(gains=(0.0,) * 4)})
    )


def test_mean_of_the_tokens_that_are_no_padding(tmp_path: Path) -> None:
    model, args, kwargs = zoo.roberta()
    site = attnopt.inspect(model, args, kwargs).sites[0]
    data = [{"input_ids": zoo.ids(seed=i), "attention_mask": zoo.padded()} for i in range(5)]
    with outputs_edited(model, site, {}) as seen:
        for batch in data:
            oracle.run(model, (), batch)
    z = torch.cat([o[batch["attention_mask"].bool()] for o, batch in zip(seen, data, strict=True)])
    fast = attnopt.optimize(model, {site.name: HeadPatch([2], "mean")}, args, kwargs, calibration=data)
    (edit,) = fast.sites[0].spec.after
    assert isinstance(edit, Replaced)
    torch.testing.assert_close(edit.values.tensor(), z[:, [2]].double().mean(0), rtol=1e-5, atol=1e-6)
    with outputs_edited(model, site, {2: z[:, 2].mean(0)}):
        want = oracle.run(model, args, kwargs)
    oracle.assert_same(oracle.run(fast, args, kwargs), want)
    assert not [n for n, _ in fast.graph_module.named_buffers() if "constant" in n], "the mean is in the output bias"


def test_a_run_is_taken_from_the_first_calibration_batch() -> None:
    model, data = stack(causal=False), batches()
    fast = attnopt.optimize(model, {"layers.1": HeadPatch([0, 3], "run")}, (data[1],), calibration=data)
    site = fast.sites[1]
    with outputs_edited(model, site, {}) as seen:
        oracle.run(model, (data[0],))
    with outputs_edited(model, site, {0: seen[0][:, :, 0], 3: seen[0][:, :, 3]}):
        want = oracle.run(model, (data[1],))
    oracle.assert_same(oracle.run(fast, (data[1],)), want)


def test_recorded_values_must_fit_the_call() -> None:
    model, x = tiny_models.Attention(), torch.randn(2, 12, 16)
    for batch in (3, 4):
        with pytest.raises(RewriteError, match="failed: "):
            attnopt.optimize(model, HeadPatch([1], torch.randn(batch, 1, 12, 8)), (x,))
    with pytest.raises(RewriteError):  # two recorded sequences, any number of sequences in a call
        attnopt.optimize(
            model, HeadPatch([1], torch.randn(2, 1, 12, 8)), (x,), dynamic_shapes={"x": {0: torch.export.Dim("B")}}
        )
    one = attnopt.optimize(
        model, HeadPatch([1], torch.randn(1, 1, 12, 8)), (x,), dynamic_shapes={"x": {0: torch.export.Dim("B")}}
    )
    assert one(torch.randn(5, 12, 16)).shape == (5, 12, 16)
    site = a_site()
    assert applied(HeadPatch([1], torch.zeros(1, 1, 12, 3)), site).spec.after
    assert "found values for 13 tokens" in refusal(HeadPatch([1], torch.zeros(1, 1, 13, 3)), site)
    assert "expected values of 3 features, found values of 4" in refusal(HeadPatch([1], torch.zeros(1, 4)), site)
    dynamic = refusal(HeadPatch([1], torch.zeros(1, 1, 12, 3)), replace(site, is_dynamic=True))
    assert "hint: remove the sequence axis from dynamic_shapes" in dynamic


# ---------------------------------------------------------------- with other passes and forms
@pytest.mark.slow
def test_edits_at_dynamic_lengths_in_onnx_runtime(tmp_path: Path) -> None:
    model, x = tiny_models.Stack(), torch.randn(2, 12, 16)
    policy = {
        "layers.0": [SoftPAG([1], 0.3), HeadPatch([0], torch.randn(1, 8))],
        "layers.1": [LocalWindow(3), SoftPAG()],
    }
    fast = attnopt.optimize(model, policy, (x,), dynamic_shapes="auto")
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for length in (12, 9, 21):
        given = torch.randn(2, length, 16)
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), fast(given), rtol=1e-4, atol=1e-5)
        plain = attnopt.optimize(model, policy, (given,), backend="reference")
        torch.testing.assert_close(fast(given), plain(given))


def test_passes_in_a_row() -> None:
    s = Spelling(kv_heads=2, mask=("causal",))
    model, given = Attention(s), inputs(s)
    for policy in (
        [PruneHeads(heads=[0]), SoftPAG([1, 2], 0.5), ScaleHeads([1, 1, 3, 1])],
        [SoftPAG([0, 1, 2], 0.5), ScaleHeads([1, 1, 3, 1]), PruneHeads(heads=[0])],
    ):
        fast = attnopt.optimize(model, policy, (), given)
        assert fast.sites[0].spec.after == (TowardValues(((1, 0.5), (2, 0.5))), Scaled(((2, 3.0),)))
        edit = oracle.Edit(own=(0.0, 0.5, 0.5, 0.0), gains=(0.0, 1.0, 3.0, 1.0))
        oracle.assert_same(oracle.run(fast, (), given), oracle.run_edited(model, (), given, {0: edit}))


def test_grouped_heads_go_toward_their_shared_values() -> None:
    model, x = tiny_models.Attention(heads=4), torch.randn(2, 12, 16)
    shared = copy.deepcopy(model)
    with torch.no_grad():
        for p in (*shared.k.parameters(), *shared.v.parameters()):
            groups = p.view(2, 2, 4, -1)
            groups.copy_(groups.mean(1, keepdim=True).expand_as(groups))
    want = oracle.run_edited(shared, (x,), None, {0: oracle.Edit(own=(0.5, 0.0, 0.5, 0.5))})
    for policy in (
        [GroupedQuery(kv_heads=2), SoftPAG([0, 2, 3], 0.5)],
        [SoftPAG([0, 2, 3], 0.5), GroupedQuery(kv_heads=2)],
    ):
        fast = attnopt.optimize(model, policy, (x,))
        assert fast.sites[0].num_kv_heads == 2
        oracle.assert_same(oracle.run(fast, (x,)), want)
    refused = refusal(GroupedQuery(kv_heads=2), applied(HeadPatch([1]), a_site()))
    assert refused.startswith("[already-edited] expected head outputs that are not edited yet, found zeros for head 1")


def test_pruning_fits_to_edited_heads() -> None:
    model, data = stack(causal=False), batches(6)
    fast = attnopt.optimize(model, [SoftPAG([0], 0.5), PruneHeads(heads=[2])], (data[0],), calibration=data)
    assert all(s.status == "rewritten" and "least squares" in " ".join(s.notes) for s in fast.report.sites)
    assert fast.sites[0].spec.after == (TowardValues(((0, 0.5),)),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = tiny_models.Attention().to(dtype), torch.randn(2, 12, 16, dtype=dtype)
    fast = attnopt.optimize(model, [SoftPAG([1], 0.25), HeadPatch([0], torch.randn(1, 8))], (x,))
    assert fast(x).dtype == dtype


def test_an_edited_model_trains() -> None:
    model, x = tiny_models.Attention(), torch.randn(2, 12, 16)
    fast = attnopt.optimize(model, [SoftPAG([1], 0.25), HeadPatch([0], torch.randn(2, 1, 12, 8))], (x,))
    fast(x).square().sum().backward()
    grads = {name: p.grad for name, p in fast.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for g in grads.values())


# ---------------------------------------------------------------- values
EDITS: list[HeadEdit] = [
    Scaled(((0, 2.0), (3, -1.0))),
    TowardValues(((1, 0.5),)),
    Replaced((2, 0), Constant.of(torch.randn(2, 8))),
    Replaced((1,), Constant.of(torch.randn(1, 1, 9, 8).bfloat16())),
    Mixed((3, 0, 2), (0.5, 1.0, 0.25), Constant.of(torch.randn(3, 9, 9))),
    Mixed((1,), (0.5,), Constant.of(torch.randn(1, 9, 9).bfloat16())),
    Routed((0,), (1, 2, 3), 1),
    Routed((0,), (1, 2, 3), 1, Constant.of(torch.randn(33, 3))),
    TokenMixing((0, 1, 2, 3), DepthwiseConv(3), (Weight.of(torch.randn(4, 3, 8)), Weight.of(torch.randn(4, 1, 1, 8)))),
    TokenMixing((0, 1, 2, 3), LinearAttention(2), (Weight.of(torch.randn(4, 8, 2)), Constant.of(torch.randn(4, 8, 2)))),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.kind)
def test_edits_read_back(edit: HeadEdit) -> None:
    import json

    assert edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit
    assert hash(edit) == hash(edit_from_json(edit.to_json()))
    spec = a_spec().followed_by(edit)
    for backend in (Sdpa(), Blocked()):
        t = {name: None if x is None else x.float() for name, x in operands(spec).items()}
        found = attention_of(backend, spec)(t.pop("q"), t.pop("k"), t.pop("v"), **t)
        torch.testing.assert_close(found.double(), computed(spec, operands(spec)), rtol=1e-4, atol=1e-4)


def test_no_backend_leaves_edits_out() -> None:
    spec = a_spec().followed_by(EDITS[1])
    t = {name: None if x is None else x.float() for name, x in operands(spec).items()}
    q, k, v = (t.pop(name) for name in ("q", "k", "v"))
    for backend in (Reference(), Sdpa(), Blocked()):
        with pytest.raises(ValueError, match="without its edits"):
            backend.lower(spec)(q, k, v, **t)


def test_unknown_edits() -> None:
    with pytest.raises(PolicyError, match="unknown head edit 'other'"):
        edit_from_json({"kind": "other"})
    with pytest.raises(ValueError, match="values of shape"):
        Replaced((1, 2), Constant.of(torch.zeros(1, 8)))
    for dtype, shape, data in (
        ("int8", (1,), b"0"),
        ("float32", (2,), b"0000"),
        ("float32", (), b""),
        ("float32", (0,), b""),
    ):
        with pytest.raises(ValueError, match="float"):
            Constant(dtype, shape, data)


def test_heads_that_are_the_same_for_every_token() -> None:
    c = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spec = replace(a_spec(), value_dim=2).followed_by(Replaced((2, 1), Constant.of(c)))
    assert {h: v.tolist() for h, v in constant_heads(spec.after).items()} == {2: [1.0, 2.0], 1: [3.0, 4.0]}
    later = replace(spec, after=(*spec.after, Scaled(((1, 2.0),)), TowardValues(((2, 0.5),))))
    assert {h: v.tolist() for h, v in constant_heads(later.after).items()} == {1: [6.0, 8.0]}
    again = spec.followed_by(Replaced((1,), Constant.of(torch.zeros(1, 1, 9, 2))))
    assert set(constant_heads(again.after)) == {2}
    assert constant_heads(spec.followed_by(Routed((0,), (1, 2, 3), 1)).after) == {}
    kept = spec.keeping([0, 1, 3]).after[0]
    assert isinstance(kept, Replaced)
    assert kept.values.tensor().tolist() == [[3.0, 4.0]]
    assert spec.keeping([0, 3]).after == ()


def test_policies_with_edits_read_back() -> None:
    for p in (SoftPAG([2, 1], 0.5), HeadPatch([2, 1], torch.randn(2, 3)), HeadPatch([1], "mean")):
        policy = attnopt.Policy.of(p)
        assert attnopt.Policy.from_json(policy.to_json()) == policy
    assert attnopt.Policy.of("soft-pag(heads=[1], u=0.5), head-patch(heads=[0], values='mean')") == attnopt.Policy.of(
        [SoftPAG([1], 0.5), HeadPatch([0], "mean")]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftPAG(u=1.5), "invalid value u=1.5: expected a number from 0 to 1"),
        (lambda: SoftPAG(heads=[-1]), "invalid value heads=-1"),
        (lambda: HeadPatch([]), "invalid value heads=[]: expected at least one head, each listed once"),
        (lambda: HeadPatch([1, 1]), "invalid value heads=[1, 1]"),
        (lambda: HeadPatch([1], "means"), "invalid values 'means'"),
        (lambda: HeadPatch([1], torch.zeros(2, 3)), "invalid values of shape [2, 3]"),
        (lambda: HeadPatch([1], torch.zeros(1, 3, dtype=torch.long)), "invalid values of shape [1, 3]"),
        (lambda: HeadPatch([1], wrong(7)), "invalid values 7"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert message in str(caught.value)


def test_what_is_refused() -> None:
    assert "[needs-self-attention]" in refusal(SoftPAG(), a_site(is_cross=True))
    assert "[needs-self-attention]" in refusal(SoftPAG(), a_site(kv_len=15))
    assert "[unknown-head]" in refusal(SoftPAG([4]), a_site())
    assert "[unknown-head]" in refusal(HeadPatch([4]), a_site())
    for values in ("mean", "run"):
        assert "[needs-calibration]" in refusal(HeadPatch([1], values), a_site())
    s = Spelling(cross=True)
    (site,) = attnopt.inspect(Attention(s), (), inputs(s)).sites
    assert site.refusals["soft-pag"].code == "needs-self-attention"
    pruned = applied(PruneHeads(heads=[1]), a_site())
    assert applied(HeadPatch([1]), pruned).spec == applied(SoftPAG([1]), pruned).spec == pruned.spec
