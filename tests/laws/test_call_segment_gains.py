"""Gains on segments whose ids each call brings: the same as the weights edited by hand, everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
from call_models import HEADS, Attention, Stack
from needs import needs_compiler
from torch import Tensor
from variants import mostly_slow

import attnopt
from attnopt import Input
from attnopt.errors import PolicyError
from attnopt.graph.nodes import opname
from attnopt.passes import (
    ExtendKeys,
    LocalWindow,
    PoolKeys,
    PruneHeads,
    QueryRows,
    ScaleHeads,
    SegmentGain,
    Sparse,
    Transplant,
)
from attnopt.patterns import Segments

pytestmark = pytest.mark.usefixtures("one_capture")

KINDS = Input("kinds")
Pairs = list[tuple[int | None, int | None]]


def belongs(pairs: Pairs, query: int, key: int) -> bool:
    return any(a in (None, query) and b in (None, key) and (a is None or a >= 0) for a, b in pairs)


def piece(pairs: Pairs, queries: Tensor, keys: Tensor) -> Tensor:
    """[B, 1, L, S], pair by pair."""
    rows = [
        [[belongs(pairs, i, j) for j in k.tolist()] for i in q.tolist()] for q, k in zip(queries, keys, strict=True)
    ]
    return torch.tensor(rows).unsqueeze(1)


def edited(
    parts: list[tuple[Pairs, float]],
    normalise: str = "logits",
    to: Pairs | None = None,
    mass: float = 0.0,
    share: float = 1.0,
    heads: tuple[int, ...] = tuple(range(HEADS)),
) -> Callable[[Tensor, Tensor], oracle.Edit]:
    def edit(queries: Tensor, keys: Tensor) -> oracle.Edit:
        def weights(p: Tensor) -> Tensor:
            factor, inside = torch.ones_like(p), torch.zeros_like(p, dtype=torch.bool)
            for pairs, gain in parts:
                here = piece(pairs, queries, keys).expand_as(p) & ~inside
                factor, inside = torch.where(here, gain, factor), inside | here
            receives = torch.zeros_like(inside) if to is None else piece(to, queries, keys).expand_as(p) & ~inside
            held, both = (p * inside).sum(-1, True), (p * (inside | receives)).sum(-1, True)
            new = p * factor
            if normalise == "logits":
                new = new / new.sum(-1, True).clamp_min(1e-30)
            if normalise == "redistribute":
                own = (p * receives).sum(-1, True)
                new = new + p * receives / own.clamp_min(1e-30) * (p - new).sum(-1, True)
                new = torch.where(own > 0, new, p)
            new = torch.where((both >= mass) & (held <= share * both), new, p)
            chosen = torch.tensor([h in heads for h in range(HEADS)])[None, :, None, None]
            return torch.where(chosen, new, p)

        return oracle.Edit(weights=weights)

    return edit


ONE: Pairs = [(None, 1)]
SOME: Pairs = [(0, 0), (2, 1), (1, None)]
CASES: dict[str, tuple[SegmentGain, Callable[[Tensor, Tensor], oracle.Edit]]] = {
    "keys of a segment": (SegmentGain(Segments(KINDS, ONE), 0.3), edited([(ONE, 0.3)])),
    "pairs": (SegmentGain(Segments(KINDS, SOME), 2.5), edited([(SOME, 2.5)])),
    "hidden": (SegmentGain(Segments(KINDS, ONE), 0.0), edited([(ONE, 0.0)])),
    "several": (
        SegmentGain([Segments(KINDS, SOME), Segments(KINDS, ONE), Segments(KINDS, [(None, 2)])], [2.0, 0.5, 0.5]),
        edited([(SOME, 2.0), (ONE, 0.5), ([(None, 2)], 0.5)]),
    ),
    "none": (SegmentGain(Segments(KINDS, ONE), 0.3, normalise="none"), edited([(ONE, 0.3)], "none")),
    "redistribute": (
        SegmentGain(Segments(KINDS, ONE), 0.4, normalise="redistribute", to=Segments(KINDS, [(None, 1), (None, 2)])),
        edited([(ONE, 0.4)], "redistribute", [(None, 2)]),
    ),
    "heads": (SegmentGain(Segments(KINDS, ONE), 3.0, heads=[1, 2]), edited([(ONE, 3.0)], heads=(1, 2))),
    "when": (
        SegmentGain(Segments(KINDS, ONE), 0.4, normalise="none", when={"mass": 0.15}),
        edited([(ONE, 0.4)], "none", mass=0.15),
    ),
}


def example(batch: int = 2, length: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Kinds from -1, which is no segment's, to 4, which no pair names."""
    torch.manual_seed(seed)
    return torch.randn(batch, length, 32), torch.randint(-1, 5, (batch, length))


def run_onnx(fast: attnopt.OptimizedModel, file: Path, feed: Mapping[str, Tensor]) -> list[Tensor]:
    fast.export_onnx(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == set(feed)
    return [torch.from_numpy(o) for o in session.run(None, {n: x.numpy() for n, x in feed.items()})]


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("kind", list(CASES))
def test_equal_the_weights_edited_by_hand(kind: str, backend: str) -> None:
    policy, edit = CASES[kind]
    model, (x, kinds) = Stack(), example()
    fast = attnopt.optimize(model, policy, (x,), {"kinds": kinds}, dynamic_shapes="auto", backend=backend)
    assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
    for x, kinds in (example(), example(3, 71, seed=1)):
        want = oracle.run_edited(model, (x,), None, {i: edit(kinds, kinds) for i in range(2)})
        oracle.assert_differs(want, oracle.run(model, (x,)))
        oracle.assert_same(oracle.run(fast, (x,), {"kinds": kinds}), want)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("kind", list(CASES))
def test_saved_and_exported(kind: str, backend: str, tmp_path: Path) -> None:
    policy, edit = CASES[kind]
    model, (x, kinds) = Stack(), example()
    fast = attnopt.optimize(model, policy, (x,), {"kinds": kinds}, dynamic_shapes="auto", backend=backend)
    for x, kinds in (example(), example(3, 71, seed=1)):
        want = oracle.run_edited(model, (x,), None, {i: edit(kinds, kinds) for i in range(2)})
        oracle.assert_same(run_onnx(fast, tmp_path / "m.onnx", {"x": x, "kinds": kinds}), want)
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert torch.equal(loaded(x, kinds=kinds), fast(x, kinds=kinds))
    assert [s.spec for s in loaded.sites] == [s.spec for s in fast.sites]
    assert torch.equal(copy.deepcopy(fast)(x, kinds=kinds), fast(x, kinds=kinds))


@needs_compiler
def test_no_map_of_weights_exists() -> None:
    """4,096 queries and keys: one map of a head would take 64 MB, and its ids one of 16 MB."""
    model, (x, kinds) = Stack(), example()
    gain, _ = CASES["redistribute"]
    fast = attnopt.optimize(model, gain, (x,), {"kinds": kinds}, dynamic_shapes="auto", backend="blocked")
    long, of_long = example(1, 4096)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as seen:
        fast(long, kinds=of_long)
    assert max(abs(e.self_cpu_memory_usage) for e in seen.events()) < 16 * 2**20
    assert not any(
        list(n.meta["val"].shape[-2:]) == [12, 12] for n in fast.graph_module.graph.nodes if "attend" in opname(n)
    )


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_ids_of_one_sequence_for_all(backend: str) -> None:
    model, (x, kinds) = Stack(), example()
    policy, edit = CASES["several"]
    fast = attnopt.optimize(model, policy, (x,), {"kinds": kinds[0]}, backend=backend)
    each = kinds[:1].expand(2, -1)
    want = oracle.run_edited(model, (x,), None, {i: edit(each, each) for i in range(2)})
    oracle.assert_same(oracle.run(fast, (x,), {"kinds": kinds[0]}), want)


@pytest.mark.parametrize("backend", mostly_slow(["blocked", "reference"], "blocked"))
def test_between_two_sequences(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (x, queries), (y, keys) = Attention(), example(), example(length=7, seed=1)
    words = Segments(Input("regions"), SOME, keys=Input("words"))
    given = {"regions": queries, "words": keys}
    fast = attnopt.optimize(model, SegmentGain(words, 0.2), (x, y), given, dynamic_shapes="auto", backend=backend)
    want = oracle.run_edited(model, (x, y), None, {0: edited([(SOME, 0.2)])(queries, keys)})
    oracle.assert_same(oracle.run(fast, (x, y), given), want)
    oracle.assert_same(run_onnx(fast, tmp_path / "m.onnx", {"x": x, "y": y, **given}), want)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_ids_far_apart(backend: str) -> None:
    """The table has rows for the ids alone that pairs name."""
    first: Pairs = [(7, 100_000), (None, 300)]
    second: Pairs = [(100_000, None)]
    gain = SegmentGain([Segments(KINDS, first), Segments(KINDS, second)], [2.0, 0.5])
    model, (x, kinds) = Stack(), example()
    kinds = torch.tensor([-1, 7, 300, 100_000, 5, 100_001])[kinds + 1]
    fast = attnopt.optimize(model, gain, (x,), {"kinds": kinds}, backend=backend)
    edit = edited([(first, 2.0), (second, 0.5)])
    want = oracle.run_edited(model, (x,), None, {i: edit(kinds, kinds) for i in range(2)})
    oracle.assert_differs(want, oracle.run(model, (x,)))
    oracle.assert_same(oracle.run(fast, (x,), {"kinds": kinds}), want)
    assert fast.sites[0].spec.of_segments[-1].shape == (3, 1, 4, 4)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_beside_what_else_a_call_brings(backend: str) -> None:
    torch.manual_seed(0)
    model, (x, kinds) = Attention(), example()
    gain, edit = CASES["several"]
    given = {"kinds": kinds, "other": torch.randn(2, 2, 12, 8), "factors": torch.rand(2, HEADS)}
    policy = [ScaleHeads(Input("factors")), gain, Transplant(q=Input("other"), heads=[1, 3])]
    fast = attnopt.optimize(model, policy, (x,), given, backend=backend)
    assert [s.status for s in fast.report.sites] == ["rewritten"]
    q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (model.q, model.k, model.v))
    other = given["other"]
    q = torch.stack([q[:, 0], other[:, 0], q[:, 2], other[:, 1]], 1)
    weights = edit(kinds, kinds).weights
    assert weights is not None
    o = weights((q @ k.mT / 8**0.5).softmax(-1)) @ v * given["factors"][:, :, None, None]
    want = x + model.o(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(fast(x, **given), want, atol=1e-5, rtol=1e-5)


def test_beside_other_passes() -> None:
    model, (x, kinds) = Stack(), example(length=40)
    gain, _ = CASES["keys of a segment"]
    plain = {}
    for policy in (
        [gain, LocalWindow(6)],
        [LocalWindow(6), gain],
        [gain, PruneHeads(heads=[1])],
        [PruneHeads(heads=[1]), gain],
    ):
        fast = attnopt.optimize(model, policy, (x,), {"kinds": kinds}, backend="blocked")
        reference = attnopt.optimize(model, policy, (x,), {"kinds": kinds}, backend="reference")
        assert all(not s.refusals for s in fast.report.sites)
        torch.testing.assert_close(fast(x, kinds=kinds), reference(x, kinds=kinds), atol=1e-5, rtol=1e-5)
        plain[str(policy[0].name), str(policy[1].name)] = fast(x, kinds=kinds)
    found = list(plain.values())
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    scaled = attnopt.optimize(model, [gain, ScaleHeads({0: 0.5})], (x,), {"kinds": kinds})
    assert all(s.status == "rewritten" for s in scaled.report.sites)


def test_gradients() -> None:
    model, (x, kinds) = Stack(), example()
    gain, _ = CASES["several"]
    fast = attnopt.optimize(model, gain, (x,), {"kinds": kinds}, backend="blocked")
    reference = attnopt.optimize(model, gain, (x,), {"kinds": kinds}, backend="reference")
    grads = []
    for made in (fast, reference):
        given = x.clone().requires_grad_()
        made(given, kinds=kinds).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


OWN = Segments(KINDS, ONE)
OTHERS = torch.ones(3, 32)
REFUSED: dict[str, tuple[Any, str]] = {
    "pools": ([PoolKeys(3), SegmentGain(OWN, 0.5)], "[already-pooled]"),
    "pools after it": ([SegmentGain(OWN, 0.5), PoolKeys(3)], "[masked-pools]"),
    "segments": ([Sparse(Segments(KINDS, SOME)), SegmentGain(OWN, 0.5)], "[already-segmented]"),
    "segments after it": ([SegmentGain(OWN, 0.5), Sparse(Segments(KINDS, SOME))], "[already-segmented]"),
    "gains": ([SegmentGain(OWN, 0.5), SegmentGain([0], 0.5)], "[already-gained]"),
    "hidden twice": ([SegmentGain(OWN, 0.5), SegmentGain(OWN, 0.0)], "[already-gained]"),
    "rows": ([QueryRows("norm", 5), SegmentGain(OWN, 0.5)], "[already-chosen]"),
    "rows after it": ([SegmentGain(OWN, 0.5), QueryRows("norm", 5)], "[already-gained]"),
    "other tokens": ([ExtendKeys(OTHERS), SegmentGain(OWN, 0.5)], "[already-extended]"),
    "other tokens after it": ([SegmentGain(OWN, 0.5), ExtendKeys(OTHERS)], "[already-gained]"),
    "others, and hidden": ([ExtendKeys(OTHERS), SegmentGain(OWN, 0.0)], "[already-extended]"),
    "no such input": ([ScaleHeads({0: 0.5}), SegmentGain(Segments(Input("x"), ONE), 0.5)], "[not-ids]"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case: str) -> None:
    policy, code = REFUSED[case]
    model, (x, kinds) = Stack(), example()
    given = {"kinds": kinds} if KINDS in attnopt.Policy.of(policy).inputs else {}
    fast = attnopt.optimize(model, policy, (x,), given)
    assert any(code in str(r) for r in fast.report.sites[0].refusals.values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"segments": Segments(KINDS), "gains": 2.0}, "does not say which segments"),
        ({"segments": [OWN, [0, 1]], "gains": 2.0}, "beside others"),
        ({"segments": [OWN, Segments(Input("other"), ONE)], "gains": 2.0}, "beside others"),
        ({"segments": OWN, "gains": 0.5, "normalise": "redistribute", "to": range(3)}, "beside others"),
        ({"segments": OWN & Segments((0, 0, 1)), "gains": 2.0}, "beside others"),
    ],
)
def test_bad_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        SegmentGain(**options)


def test_texts_and_reports() -> None:
    gain = SegmentGain(OWN, 0.5, normalise="redistribute", to=Segments(KINDS, [(None, 2)]))
    assert attnopt.Policy.from_json(attnopt.Policy.of(gain).to_json()) == attnopt.Policy.of(gain)
    model, (x, kinds) = Stack(), example()
    fast = attnopt.optimize(model, gain, (x,), {"kinds": kinds})
    assert "weights x 0.5 in Segments(Input('kinds'), pairs=((None, 1),))" in str(fast.report)
