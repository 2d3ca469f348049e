"""Models whose attentions read other tokens: the same as the joint sequence in which only the tokens' own rows are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
from models import Attention, Spelling, inputs
from torch import Tensor, nn

import attnopt
from attnopt import Input
from attnopt.passes import (
    AddValues,
    DynamicSparse,
    ExtendKeys,
    GroupedQuery,
    HeadPatch,
    LocalWindow,
    MixMap,
    PruneHeads,
    RouteHeads,
    ScaleHeads,
    SoftPAG,
    Sparse,
    Steer,
)
from attnopt.patterns import Segments, Sinks

pytestmark = pytest.mark.usefixtures("one_capture")
M = 3
SHARED = Spelling(heads=6, kv_heads=2, head_dim=5, value_dim=3, share="repeat_interleave", packing="fused")
SPELLINGS = {
    "plain": Spelling(),
    "shared": SHARED,
    "tiled": Spelling(heads=6, kv_heads=2, share="tiled"),
    "expanded": Spelling(heads=6, kv_heads=2, share="expand", packing="kv"),
    "per head": Spelling(packing="per-head", unpack="unbind"),
    "per group": Spelling(heads=6, kv_heads=2, packing="per-group", unpack="index"),
    "select": Spelling(packing="fused", unpack="select"),
    "unbind": Spelling(packing="fused", unpack="unbind"),
    "slice": Spelling(packing="fused", unpack="slice"),
    "addmm": Spelling(op="addmm", packing="fused"),
    "conv1d": Spelling(op="conv1d", packing="fused"),
    "conv2d": Spelling(op="conv2d"),
    "einsum": Spelling(op="einsum", core="einsum"),
    "parameter": Spelling(op="parameter", core="bmm"),
    "layer norm": Spelling(norm="layer"),
    "rms norm": Spelling(norm="rms", core="sdpa"),
    "unit length": Spelling(norm="l2", scale="temperature"),
    "norm across": Spelling(norm="across"),
    "sinks": Spelling(sinks=True),
    "softcap": Spelling(softcap=2.0),
    "sdpa": Spelling(core="sdpa", heads=6, kv_heads=3, share="enable_gqa"),
    "scaled keys": Spelling(scale="k"),
    "both scaled": Spelling(scale="both", core="heads-last"),
    "before a norm": Spelling(pre_norm=True, residual=True),
    "grouped": Spelling(heads=6, kv_heads=2, core="grouped"),
}


def features(width: int, count: int = M, seed: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def jointly(model: nn.Module, x: Tensor, reference: Tensor, own: Tensor | None = None, **edit: Any) -> list[Tensor]:
    """The rows of the tokens where they see all of the reference, which comes first, and of themselves ``own`` [.., L, L]."""
    R, L = len(reference), x.shape[1]
    lead = () if own is None else own.shape[:-2]
    seen = torch.ones(*lead, R + L, R + L, dtype=torch.bool)
    if own is not None:
        seen[..., R:, R:] = own
    joint = torch.cat([reference.expand(len(x), -1, -1), x], 1)
    (out,) = oracle.run_edited(model, (joint,), None, {0: oracle.Edit(seen, **edit)}, heads=model.s.heads)
    return [out[:, R:]]


@pytest.mark.slow
@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_it_equals_the_joint_sequence(spelling: str) -> None:
    s = SPELLINGS[spelling]
    model, given = Attention(s), inputs(s)
    reference = features(s.width)
    read = model.pre(reference) if s.pre_norm else reference
    want = jointly(model, given["x"], reference)
    oracle.assert_differs(want, oracle.run(model, (), given))
    for backend in ("auto", "blocked", "reference"):
        fast = attnopt.optimize(model, ExtendKeys(read), (), given, backend=backend)
        (site,) = fast.report.sites
        assert (site.status, dict(site.refusals)) == ("rewritten", {})
        oracle.assert_same(oracle.run(fast, (), given), want, backend)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["plain", "shared", "rms norm", "addmm", "sinks", "per group"])
def test_it_composes_with_other_passes(spelling: str) -> None:
    """In both orders; heads are pruned and patterns hide own keys alone."""
    s = SPELLINGS[spelling]
    model, given = Attention(s), inputs(s)
    L, reference, extend = given["x"].shape[1], features(s.width), ExtendKeys(features(s.width))
    step = torch.arange(L)[None] - torch.arange(L)[:, None]
    gains = (1.0, 0.0, *(1.0,) * (s.heads - 3), 2.0)
    edits = [PruneHeads(heads=[1]), ScaleHeads({s.heads - 1: 2.0}), LocalWindow(1, 1)]
    want = jointly(model, given["x"], reference, (step.abs() <= 1).expand(s.heads, -1, -1), gains=gains)
    for policy in ([extend, *edits], [*edits, extend]):
        for backend in ("auto", "blocked", "sdpa"):
            if backend == "sdpa" and s.sinks:
                continue
            fast = attnopt.optimize(model, policy, (), given, backend=backend)
            assert not fast.report.sites[0].refusals
            oracle.assert_same(oracle.run(fast, (), given), want, backend)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["plain", "shared", "slice", "addmm", "conv1d"])
@pytest.mark.parametrize("fold", [True, False])
def test_merged_heads_read_the_reference_by_new_weights(spelling: str, fold: bool) -> None:
    s = SPELLINGS[spelling]
    model, given = Attention(s), inputs(s)
    reference = features(s.width)
    group = GroupedQuery(kv_heads=1, merge="mean")
    merged = attnopt.optimize(model, group, (), given, backend="reference")
    rows = torch.cat([reference.expand(len(given["x"]), -1, -1), given["x"]], 1)
    fast = attnopt.optimize(model, group, (), {"x": rows}, backend="reference")
    want = [fast(rows)[:, M:]]  # all see all: the grouped model on the joint sequence
    oracle.assert_differs(want, oracle.run(merged, (), given))
    policy = [ExtendKeys(reference), group] if fold else [group, ExtendKeys(reference)]
    got = attnopt.optimize(model, policy, (), given)
    assert not got.report.sites[0].refusals
    oracle.assert_same(oracle.run(got, (), given), want)


def test_causal_models() -> None:
    s = Spelling(mask=("causal",))
    model, given = Attention(s), inputs(s)
    reference = features(s.width)
    L = given["x"].shape[1]
    want = jointly(model, given["x"], reference, torch.ones(L, L, dtype=torch.bool).tril())
    for backend in ("auto", "blocked", "sdpa", "reference"):
        fast = attnopt.optimize(model, ExtendKeys(reference), (), given, backend=backend)
        oracle.assert_same(oracle.run(fast, (), given), want, backend)


def test_biases_and_padding_are_those_of_own_keys() -> None:
    """A table of relative positions is added to own scores; the reference has no place."""
    s = Spelling(mask=("padding",), bias_kind="alibi")
    model, given = Attention(s), inputs(s)
    reference = features(s.width)
    fast = attnopt.optimize(model, ExtendKeys(reference, 2.0, [0, 3]), (), given)
    assert not fast.report.sites[0].refusals
    want = by_hooks(model, given, reference, 2.0, [0, 3])
    oracle.assert_same(oracle.run(fast, (), given), want)


def by_hooks(
    model: Attention, given: dict[str, Tensor], reference: Tensor, weight: float, heads: Sequence[int]
) -> list[Tensor]:
    """The model with its softmax over own scores and those of the reference, and its product with both kinds of values."""
    s = model.s
    found = model._heads(reference[None], reference[None])
    k, v = (found[role].transpose(1, 2) for role in ("k", "v"))  # [1, n, M, d]
    queries, parts = list[Tensor](), list[Tensor]()
    softmax, scale = torch.softmax, s.head_dim**-0.5

    def on_softmax(x: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor:
        q = model._heads(given["x"], given["x"])["q"].transpose(1, 2)
        queries.append(q)
        more = scale * q @ k.mT + torch.tensor(weight).log()
        hidden = torch.tensor([h not in heads for h in range(s.heads)])[:, None, None]
        p = softmax(torch.cat([x, more.masked_fill(hidden, -torch.inf)], -1), -1)
        parts.append(p[..., x.shape[-1] :] @ v)
        return p[..., : x.shape[-1]]

    product = model.w_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "softmax", on_softmax)
        patch.setattr(torch.Tensor, "softmax", on_softmax)
        patch.setattr(torch.nn.functional, "softmax", on_softmax)
        (own,) = oracle.run(model, (), given)
    assert len(parts) == 1
    return [own + parts[0].transpose(1, 2).flatten(2) @ product.mT]


def test_nothing_changes() -> None:
    model, given = Attention(Spelling()), inputs(Spelling())
    reference = features(12)
    plain = attnopt.optimize(model, "fuse", (), given)
    for p, told in {
        ExtendKeys(reference, weight=0): "weight 0, which changes nothing",
        ExtendKeys(reference[:0]): "no token of the reference is seen, which changes nothing",
        ExtendKeys(torch.zeros(1, 0, 12)): "no token of the reference is seen, which changes nothing",
        ExtendKeys(reference, mask=[False] * M): "no token of the reference is seen, which changes nothing",
    }.items():
        fast = attnopt.optimize(model, p, (), given)
        assert fast.sites[0].spec.extension is None
        assert f"extend-keys: {told}" in fast.report.sites[0].notes
        assert torch.equal(fast(**given), plain(**given))


def test_a_mask_and_copies() -> None:
    model, given = Attention(SHARED), inputs(SHARED)
    reference = features(12, 5)
    seen = [True, False, True, True, False]
    want = jointly(model, given["x"], reference[torch.tensor(seen)].repeat(3, 1))
    for given_mask in (seen, torch.tensor([seen])):
        fast = attnopt.optimize(model, ExtendKeys(reference, 3.0, mask=given_mask), (), given)
        oracle.assert_same(oracle.run(fast, (), given), want)
        assert fast.sites[0].spec.extension is not None
        assert fast.sites[0].spec.extension.tokens == 3


def test_sequences_have_references_and_masks_of_their_own() -> None:
    s = Spelling()
    model, x = Attention(s), torch.randn(2, 7, 12)
    both, seen = (
        torch.stack([features(12), features(12, seed=8)]),
        torch.tensor([[True, False, True], [False, True, False]]),
    )
    want = [torch.cat([jointly(model, x[i : i + 1], both[i][seen[i]])[0] for i in range(2)])]
    for backend in ("auto", "blocked", "sdpa", "reference"):
        fast = attnopt.optimize(model, ExtendKeys(both, mask=seen), (x,), backend=backend)
        oracle.assert_same(oracle.run(fast, (x,)), want, backend)
    want = [torch.cat([jointly(model, x[i : i + 1], features(12)[seen[i]])[0] for i in range(2)])]
    fast = attnopt.optimize(model, ExtendKeys(features(12), mask=seen), (x,))
    oracle.assert_same(oracle.run(fast, (x,)), want)


def test_segments_of_the_joint_sequence_say_the_same() -> None:
    """Tokens 0-3 see themselves and the reference; another rewrite of the joint sequence says so, too."""
    model, x = Attention(Spelling()), torch.randn(2, 4, 12)
    reference = features(12)
    segments = Sparse(Segments([0] * M + [1] * 4, pairs=[(0, 0), (1, 0), (1, 1)]))
    joint = torch.cat([reference.expand(2, -1, -1), x], 1)
    want = attnopt.optimize(model, segments, (joint,))(joint)[:, M:]
    got = attnopt.optimize(model, ExtendKeys(reference), (x,))(x)
    oracle.assert_same([got], [want])


class Tokens(nn.Module):
    """Two layers as in a vision transformer: a norm, packed projections, a residual stream."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            y = norm(x)
            x = x + attention(y, y, y, need_weights=False)[0]
        return x


def mha(module: nn.MultiheadAttention, y: Tensor, reference: Tensor) -> Tensor:
    """torch's own module takes keys of other tokens beside those of its queries."""
    keys = torch.cat([y, reference.expand(len(y), -1, -1)], 1)
    out: Tensor = module(y, keys, keys, need_weights=False)[0]
    return out


def tokens_by_hand(model: Tokens, x: Tensor, references: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        for norm, attention, reference in zip(model.norms, model.attentions, references, strict=True):
            x = x + mha(attention, norm(x), reference)
    return [x]


def exported(fast: attnopt.OptimizedModel, file: Path, **feed: Tensor) -> list[Tensor]:
    fast.export_onnx(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == set(feed)
    return [torch.from_numpy(o) for o in session.run(None, {n: x.numpy() for n, x in feed.items()})]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_layers_at_every_length_and_in_onnx(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(2, 12, 32)
    references = [features(32), features(32, 5, seed=9)]
    policy = {f"attentions.{i}": ExtendKeys(r) for i, r in enumerate(references)}
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    fast = attnopt.optimize(model, policy, (x,), dynamic_shapes=shapes, backend=backend)
    assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
    assert not any(s.refusals for s in fast.report.sites)
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert [s.spec for s in loaded.sites] == [s.spec for s in fast.sites]
    for batch, length in ((2, 12), (3, 7), (2, 130)):
        x = torch.randn(batch, length, 32)
        want = tokens_by_hand(model, x, references)
        oracle.assert_differs(want, oracle.run(model, (x,)))
        oracle.assert_same(oracle.run(fast, (x,)), want)
        oracle.assert_same(exported(fast, tmp_path / "m.onnx", x=x), want)
        assert torch.equal(loaded(x), fast(x))
        assert torch.equal(copy.deepcopy(fast)(x), fast(x))


@pytest.mark.slow
def test_a_window_beside_the_reference_in_onnx(tmp_path: Path) -> None:
    """Own keys under a pattern are attended to apart from the reference; ONNX Runtime gives the same."""
    model, x = Attention(Spelling()), torch.randn(2, 9, 12)
    step = torch.arange(9)[None] - torch.arange(9)[:, None]
    want = jointly(model, x, features(12).repeat(2, 1), (step >= -2) & (step <= 0))
    for backend in ("blocked", "sdpa"):
        policy = [ExtendKeys(features(12), 2.0), LocalWindow(2, 0)]
        fast = attnopt.optimize(model, policy, (x,), dynamic_shapes="auto", backend=backend)
        oracle.assert_same(oracle.run(fast, (x,)), want, backend)
        oracle.assert_same(exported(fast, tmp_path / "m.onnx", x=x), want, backend)


def test_the_keys_of_a_constant_are_stored() -> None:
    """The projections run on the tokens alone, and what is stored has the size of keys and values."""
    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    before = sum(1 for n in attnopt.optimize(model, "fuse", (x,)).graph_module.graph.nodes if "linear" in str(n.target))
    fast = attnopt.optimize(model, ExtendKeys(features(12)), (x,))
    graph = fast.graph_module
    assert sum(1 for n in graph.graph.nodes if "linear" in str(n.target)) == before
    assert sorted(tuple(b.shape) for b in graph.buffers() if b.dim() == 4) == [(1, 4, M, 4), (1, 4, M, 4)]


def test_gradients_reach_inputs_and_weights() -> None:
    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    reference = features(12)
    joint = torch.cat([reference.expand(2, -1, -1), x], 1).requires_grad_()
    model(joint)[:, M:].square().sum().backward()
    assert joint.grad is not None
    for backend in ("blocked", "sdpa"):
        y = x.clone().requires_grad_()
        fast = attnopt.optimize(model, ExtendKeys(reference), (x,), backend=backend)
        fast(y).square().sum().backward()
        torch.testing.assert_close(y.grad, joint.grad[:, M:], atol=1e-4, rtol=1e-4)


EDITS: dict[str, Any] = {
    "add values": AddValues([0], 0.5),
    "identity": SoftPAG(None, 0.3),
    "steer": Steer(torch.ones(4), [2]),
    "patch": HeadPatch([1], torch.ones(1, 4)),
    "map": MixMap(torch.eye(7) / 7, 0.5),
    "route": RouteHeads([0], 1),
    "blocks": DynamicSparse(keep=0.5, block=64),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", list(EDITS))
def test_edits_stand_in_either_order(edit: str) -> None:
    """They are changes of head outputs, which the reference reaches first, or choices among own keys."""
    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    extend = ExtendKeys(features(12))
    made = [attnopt.optimize(model, p, (x,)) for p in ([extend, EDITS[edit]], [EDITS[edit], extend])]
    assert not any(s.refusals for fast in made for s in fast.report.sites)
    first, second = (oracle.run(fast, (x,)) for fast in made)
    oracle.assert_same(first, second)
    oracle.assert_differs(first, oracle.run(attnopt.optimize(model, EDITS[edit], (x,)), (x,)))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "mask"), [("auto", True), ("blocked", False), ("sdpa", True), ("blocked", True)])
def test_references_that_each_call_brings(backend: str, mask: bool, tmp_path: Path) -> None:
    """Of any number of tokens and sequences, also in ONNX Runtime."""
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(2, 12, 32)
    given = {"first": torch.randn(2, 5, 32), "second": torch.randn(2, 4, 32)}
    if mask:
        given["seen"] = torch.rand(2, 5) < 0.6
    policy = {
        "attentions.0": ExtendKeys(Input("first"), mask=Input("seen") if mask else None),
        "attentions.1": ExtendKeys(Input("second")),
    }
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    fast = attnopt.optimize(model, policy, (x,), given, dynamic_shapes=shapes, backend=backend)
    assert not any(s.refusals for s in fast.report.sites)
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert [s.spec for s in loaded.sites] == [s.spec for s in fast.sites]
    for batch, length, counts in ((2, 12, (5, 4)), (3, 7, (2, 9)), (2, 70, (80, 3))):
        x = torch.randn(batch, length, 32)
        given = {name: torch.randn(batch, n, 32) for name, n in zip(("first", "second"), counts, strict=True)}
        seen = torch.rand(batch, counts[0]) < 0.6 if mask else torch.ones(batch, counts[0], dtype=torch.bool)
        want = [
            torch.cat(
                [
                    tokens_by_hand(model, x[i : i + 1], [given["first"][i, seen[i]], given["second"][i]])[0]
                    for i in range(batch)
                ]
            )
        ]
        given |= {"seen": seen} if mask else {}
        oracle.assert_same(oracle.run(fast, (x,), given), want)
        assert torch.equal(loaded(x, **given), fast(x, **given))
        oracle.assert_same(exported(fast, tmp_path / "m.onnx", x=x, **given), want)


INPUTS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "for all sequences": ({}, features(12, 5)),
    "one sequence": ({"weight": 2.0}, features(12, 5)[None]),
    "a known mask": ({"mask": [True, False, True, True, False]}, features(12, 5)),
    "half precision": ({}, features(12, 5).half()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "spelling"), [*zip(INPUTS, ("plain", "shared", "conv1d", "plain"), strict=True)], ids=list(INPUTS)
)
def test_inputs_go_through_new_weights(kind: str, spelling: str) -> None:
    """Heads are pruned and merged before and after."""
    options, reference = INPUTS[kind]
    s = SPELLINGS[spelling]
    model, given = Attention(s), inputs(s)
    edits = [GroupedQuery(kv_heads=2, merge="mean"), PruneHeads(heads=[1])]
    for put in (lambda p: [p, *edits], lambda p: [*edits, p], lambda p: [edits[0], p, edits[1]]):
        fast = attnopt.optimize(model, put(ExtendKeys(Input("ref"), **options)), (), {**given, "ref": reference})
        assert not fast.report.sites[0].refusals
        want = attnopt.optimize(model, put(ExtendKeys(reference, **options)), (), given)
        oracle.assert_same(oracle.run(fast, (), {**given, "ref": reference}), oracle.run(want, (), given))


def test_constant_references_under_masks_of_a_call() -> None:
    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    seen = torch.tensor([[True, False, True], [False, False, False]])
    for reference in (features(12), torch.stack([features(12), features(12, seed=8)])):
        fast = attnopt.optimize(model, ExtendKeys(reference, mask=Input("seen")), (x,), {"seen": seen})
        each = reference if reference.dim() == 3 else reference.expand(2, -1, -1)
        want = [torch.cat([jointly(model, x[i : i + 1], each[i][seen[i]])[0] for i in range(2)])]
        oracle.assert_same(oracle.run(fast, (x,), {"seen": seen}), want)


def test_gradients_reach_what_a_call_brings() -> None:
    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    joint = torch.cat([features(12).expand(2, -1, -1), x], 1).requires_grad_()
    model(joint)[:, M:].square().sum().backward()
    assert joint.grad is not None
    for backend in ("blocked", "sdpa"):
        reference = features(12).requires_grad_()
        fast = attnopt.optimize(model, ExtendKeys(Input("ref")), (x,), {"ref": reference.detach()}, backend=backend)
        fast.zero_grad()
        fast(x, ref=reference).square().sum().backward()
        torch.testing.assert_close(reference.grad, joint.grad[:, :M].sum(0), atol=1e-4, rtol=1e-4)
        assert fast.graph_module.k_proj.weight is model.k_proj.weight


def test_optimized_again() -> None:
    """Of the result, the attention over joined keys is found; they are no longer computed from each token alone."""
    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    fast = attnopt.optimize(model, ExtendKeys(features(12)), (x,), backend="sdpa")
    again = attnopt.optimize(fast, "fuse", (x,))
    oracle.assert_same(oracle.run(again, (x,)), oracle.run(fast, (x,)))
    twice = attnopt.optimize(fast, ["fuse", ExtendKeys(features(12))], (x,))
    refused = twice.report.sites[0].refusals["extend-keys"]
    assert refused.code == "not-token-wise"
    assert refused.found.startswith("cat (models.py:")
    oracle.assert_same(oracle.run(twice, (x,)), oracle.run(fast, (x,)))
    pruned = attnopt.optimize(fast, PruneHeads(heads=[2]), (x,))
    assert not pruned.report.sites[0].refusals
    want = oracle.run(attnopt.optimize(model, [ExtendKeys(features(12)), PruneHeads(heads=[2])], (x,)), (x,))
    oracle.assert_same(oracle.run(pruned, (x,)), want)


def test_guidance_pushes_away_from_it() -> None:
    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    weak = attnopt.optimize(model, ExtendKeys(features(12)), (x,))
    fast = attnopt.guidance(model, ExtendKeys(features(12)), (x,), scale=2.0)
    with torch.no_grad():
        strong = model(x)
        oracle.assert_same([fast(x)], [strong + 2.0 * (strong - weak(x))])


def test_sinks_and_reference_of_a_pattern() -> None:
    """The first tokens and the reference, and nothing else."""
    model, x = Attention(Spelling()), torch.randn(2, 9, 12)
    own = Sinks(1).mask(9, 9)[0]
    want = jointly(model, x, features(12), own)
    fast = attnopt.optimize(model, [ExtendKeys(features(12)), Sparse(Sinks(1))], (x,))
    oracle.assert_same(oracle.run(fast, (x,)), want)


@contextmanager
def reading(layers: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Attention modules without masks run on their tokens and, behind them, a reference; the tokens' rows are kept."""

    def joint(forward: Callable[..., Any], reference: Tensor) -> Callable[..., Any]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = forward(torch.cat([x, reference.expand(len(x), -1, -1)], 1), *args, **kwargs)
            return (out[0][:, : x.shape[1]], *out[1:]) if isinstance(out, tuple) else out[:, : x.shape[1]]

        return run

    for module, reference in layers.items():
        module.forward = joint(module.forward, reference)
    try:
        yield
    finally:
        for module in layers:
            del module.forward


def deit() -> tuple[nn.Module, tuple[Any, ...]]:
    from zoo import deit as made

    model, args, _ = made()
    return model, args


def bert() -> tuple[nn.Module, tuple[Any, ...]]:
    from zoo import SMALL, hf, ids

    return hf("BertModel", "BertConfig", **SMALL, impl="sdpa", add_pooling_layer=False), (ids(),)


def vit() -> tuple[nn.Module, tuple[Any, ...]]:
    """With norms of queries and keys, and packed projections."""
    from zoo import pixels, timm_model

    model = timm_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, qk_norm=True
    )
    return model.eval(), (pixels(),)


@pytest.mark.slow
@pytest.mark.parametrize("made", [deit, bert, vit])
def test_models_of_libraries(made: Callable[[], tuple[nn.Module, tuple[Any, ...]]], tmp_path: Path) -> None:
    model, args = made()
    sites = [s.name for s in attnopt.inspect(model, args).sites]
    assert len(sites) == 2
    references = [features(24, 5), features(24, 4, seed=6)]
    owners = [model.get_submodule(s) for s in sites]
    with reading(dict(zip(owners, references, strict=True))):
        want = oracle.run(model, args)
    oracle.assert_differs(want, oracle.run(model, args))
    policy = {s: ExtendKeys(r) for s, r in zip(sites, references, strict=True)}
    fast = attnopt.optimize(model, policy, args)
    assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
    oracle.assert_same(oracle.run(fast, args), want)
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: args[0].numpy()})
    oracle.assert_same([torch.from_numpy(x) for x in got], want)
    opened = attnopt.optimize(str(tmp_path / "m.onnx"), "fuse", args)
    oracle.assert_same(oracle.run(opened, args), want)


class SingleStream(nn.Module):
    """A block of a diffusion transformer over text and image tokens in one sequence, modulated by a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.norm = nn.Linear(24, 72), nn.LayerNorm(24, elementwise_affine=False)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(6), nn.RMSNorm(6)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x = torch.cat([text, image], 1)
        shift, scale, gate = self.modulation(nn.functional.silu(time))[:, None].chunk(3, -1)
        return (x + gate * self.attend(self.norm(x) * (1 + scale) + shift))[:, text.shape[1] :]

    def attend(self, y: Tensor, more: Tensor | None = None) -> Tensor:
        keys = y if more is None else torch.cat([y, more.expand(len(y), -1, -1)], 1)
        q, k, v = (f(z).unflatten(-1, (4, 6)).transpose(1, 2) for f, z in ((self.q, y), (self.k, keys), (self.v, keys)))
        o = nn.functional.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.o(o.transpose(1, 2).flatten(2))


class TwoStreams(SingleStream):
    """The same with projections of its own for the text."""

    def __init__(self) -> None:
        super().__init__()
        self.text_k, self.text_v = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        q = self.q(image)
        k, v = (torch.cat([g(text), f(image)], 1) for f, g in ((self.k, self.text_k), (self.v, self.text_v)))
        q, k, v = (z.unflatten(-1, (4, 6)).transpose(1, 2) for z in (q, k, v))
        o = nn.functional.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return image + self.o(o.transpose(1, 2).flatten(2))


def test_blocks_of_diffusion_transformers() -> None:
    """DreamTuner: the block reads the reference that another run brought to the same place."""
    torch.manual_seed(0)
    args = (torch.randn(2, 9, 24), torch.randn(2, 4, 24), torch.randn(2, 24))
    model, reference = SingleStream().eval(), features(24, 5)
    fast = attnopt.optimize(model, ExtendKeys(reference, 2.0), args)
    assert not fast.report.sites[0].refusals
    plain = model.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "attend", lambda y: plain(y, reference.repeat(2, 1)))
        want = oracle.run(model, args)
    oracle.assert_differs(want, oracle.run(model, args))
    oracle.assert_same(oracle.run(fast, args), want)
    two = TwoStreams().eval()
    left = attnopt.optimize(two, ["fuse", ExtendKeys(reference)], args)
    assert left.report.sites[0].refusals["extend-keys"].code in ("several-sources", "not-token-wise")
    oracle.assert_same(oracle.run(left, args), oracle.run(two, args))
