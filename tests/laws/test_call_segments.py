"""Segments whose ids each call brings: the same as the mask that they amount to, everywhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
from call_models import HEADS, Attention, Stack
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt import Input
from attnopt.passes import (
    AddValues,
    GroupedQuery,
    LocalWindow,
    PoolKeys,
    PruneHeads,
    ScaleHeads,
    SegmentGain,
    SoftPAG,
    Sparse,
)
from attnopt.patterns import Full, Pattern, PerHead, Segments, Window

pytestmark = pytest.mark.usefixtures("one_capture")

OWN = Segments(Input("region_ids"))
PAIRS = ((0, 0), (1, 1), (0, 1), (2, 0))
OF_HEADS: dict[str, tuple[Pattern, list[tuple[tuple[int, int], ...] | None] | None]] = {
    "own": (OWN, None),
    "pairs": (Segments(Input("region_ids"), PAIRS), [PAIRS] * HEADS),
    "by head": (
        PerHead({(0, 2): Segments(Input("region_ids"), PAIRS), 1: Segments(Input("region_ids"), ((0, 2),))}),
        [PAIRS, ((0, 2),), PAIRS, None],
    ),
}


def visible(queries: Tensor, keys: Tensor, pairs: Sequence[Sequence[tuple[int, int]] | None] | None = None) -> Tensor:
    """[B, H, L, S], pair by pair."""
    B, L, S = queries.shape[0], queries.shape[1], keys.shape[1]
    seen = torch.zeros(B, HEADS, L, S, dtype=torch.bool)
    for b in range(B):
        for h in range(HEADS):
            for i, one in enumerate(queries[b].tolist()):
                for j, other in enumerate(keys[b].tolist()):
                    own = None if pairs is None else pairs[h]
                    if pairs is None:
                        seen[b, h, i, j] = one == other and one >= 0
                    else:
                        seen[b, h, i, j] = own is None or (one, other) in own
    return seen


def under(seen: Tensor) -> oracle.Edit:
    """Queries that see nothing give zeros."""
    return oracle.Edit(seen, weights=lambda p: p.nan_to_num(0.0))


def example(batch: int = 2, length: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids from -1, which is no segment's, to 3, which no pair names."""
    torch.manual_seed(seed)
    return torch.randn(batch, length, 32), torch.randint(-1, 4, (batch, length))


def run_onnx(fast: attnopt.OptimizedModel, file: Path, feed: Mapping[str, Tensor]) -> list[Tensor]:
    fast.export_onnx(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == set(feed)
    return [torch.from_numpy(o) for o in session.run(None, {n: x.numpy() for n, x in feed.items()})]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["blocked", "sdpa", "reference"])
@pytest.mark.parametrize("kind", list(OF_HEADS))
def test_equal_the_mask_at_every_length(kind: str, backend: str, tmp_path: Path) -> None:
    pattern, pairs = OF_HEADS[kind]
    model, (x, ids) = Stack(), example()
    fast = attnopt.optimize(model, Sparse(pattern), (x,), {"region_ids": ids}, dynamic_shapes="auto", backend=backend)
    assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
    for x, ids in (example(), example(3, 71, seed=1)):
        seen = visible(ids, ids, pairs)
        want = oracle.run_edited(model, (x,), None, {i: under(seen) for i in range(2)})
        oracle.assert_differs(want, oracle.run(model, (x,)))
        oracle.assert_same(oracle.run(fast, (x,), {"region_ids": ids}), want)
        oracle.assert_same(run_onnx(fast, tmp_path / "m.onnx", {"x": x, "region_ids": ids}), want)
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert torch.equal(loaded(x, region_ids=ids), fast(x, region_ids=ids))
    assert [s.spec for s in loaded.sites] == [s.spec for s in fast.sites]
    assert torch.equal(copy.deepcopy(fast)(x, region_ids=ids), fast(x, region_ids=ids))


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_join_a_pattern(backend: str) -> None:
    model, (x, ids) = Stack(), example(length=40)
    fast = attnopt.optimize(model, Sparse(OWN & Window(5, 5)), (x,), {"region_ids": ids}, backend=backend)
    seen = visible(ids, ids) & Window(5, 5).mask(40, 40)
    want = oracle.run_edited(model, (x,), None, {i: under(seen) for i in range(2)})
    oracle.assert_same(oracle.run(fast, (x,), {"region_ids": ids}), want)


@pytest.mark.parametrize("pairs", [None, PAIRS])
@pytest.mark.parametrize("backend", mostly_slow(["blocked", "sdpa"], "sdpa"))
def test_between_two_sequences(backend: str, pairs: tuple[tuple[int, int], ...] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (x, queries), (y, keys) = Attention(), example(), example(length=7, seed=1)
    policy = Sparse(Segments(Input("regions"), pairs, keys=Input("words")))
    given = {"regions": queries, "words": keys}
    fast = attnopt.optimize(model, policy, (x, y), given, dynamic_shapes="auto", backend=backend)
    for shorter, longer in ((example(), example(length=7, seed=1)), (example(3, 33), example(3, 50, seed=2))):
        (x, queries), (y, keys) = shorter, longer
        seen = visible(queries, keys, None if pairs is None else [pairs] * HEADS)
        want = oracle.run_edited(model, (x, y), None, {0: under(seen)})
        given = {"regions": queries, "words": keys}
        oracle.assert_same(oracle.run(fast, (x, y), given), want)
        oracle.assert_same(run_onnx(fast, tmp_path / "m.onnx", {"x": x, "y": y, **given}), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        PruneHeads(heads=[1]),
        GroupedQuery(kv_heads=2),
        ScaleHeads({1: 2.0}),
        LocalWindow(4),
        SoftPAG(heads=[0], u=0.5),
        AddValues([1, -1], alpha=0.5, heads=[0]),
        SegmentGain([0, 1], 0.5),
        SegmentGain([0, 1], 0.5, normalise="redistribute", to=range(2, 10)),
    ],
    ids=lambda p: p.name,
)
def test_with_other_passes_in_any_order(other: Any) -> None:
    model, (x, ids) = Stack(), example()
    given = {"region_ids": ids}
    made = [
        attnopt.optimize(model, policy, (x,), given, backend=backend)(x, **given)
        for policy in ([Sparse(OWN), other], [other, Sparse(OWN)])
        for backend in ("blocked", "reference")
    ]
    alone = attnopt.optimize(model, Sparse(OWN), (x,), given)(x, **given)
    oracle.assert_differs([made[0]], [alone])
    for again in made[1:]:
        oracle.assert_same([again], [made[0]])


def test_after_past_keys() -> None:
    class Continued(Attention):
        """Earlier tokens come as keys and values."""

        def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            return x + self.o(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Continued()
    fast = None
    for length, past in ((5, 9), (8, 3)):
        x, _ = example(length=length)
        _, ids = example(length=length + past, seed=2)
        keys, values = (torch.randn(2, HEADS, past, 8) for _ in range(2))
        given = {"region_ids": ids}
        fast = fast or attnopt.optimize(model, Sparse(OWN), (x, keys, values), given, dynamic_shapes="auto")
        assert fast.report.sites[0].status == "rewritten"
        seen = visible(ids[:, past:], ids)
        want = oracle.run_edited(model, (x, keys, values), None, {0: under(seen)})
        oracle.assert_same(oracle.run(fast, (x, keys, values), given), want)


def test_gradients_are_those_under_the_mask() -> None:
    model, (x, ids) = Stack(), example(length=70)
    fast = attnopt.optimize(model, Sparse(OWN), (x,), {"region_ids": ids}, backend="blocked")
    own, by_hand = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(own, region_ids=ids).square().sum().backward()
    with oracle.edited({i: under(visible(ids, ids)) for i in range(2)}):
        model(by_hand).square().sum().backward()
    assert own.grad is not None
    assert by_hand.grad is not None
    oracle.assert_same([own.grad], [by_hand.grad])


def test_an_argument_of_the_model_itself() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.kinds, self.stack = nn.Embedding(3, 32), Stack()

        def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
            return self.stack(x + self.kinds(kinds))

    model, (x, ids) = Typed(), example()
    ids = ids.clamp(0, 2)
    fast = attnopt.optimize(model, Sparse(Segments(Input("kinds"))), (x, ids), dynamic_shapes="auto")
    x, ids = example(3, 31)
    ids = ids.clamp(0, 2)
    want = oracle.run_edited(model, (x, ids), None, {i: under(visible(ids, ids)) for i in range(2)})
    oracle.assert_same(oracle.run(fast, (x, ids)), want)


@pytest.mark.parametrize("shapes", ["auto", {"x": {1: torch.export.Dim("n")}}])
def test_ids_of_one_sequence_for_a_batch(shapes: Any) -> None:
    model, (x, ids) = Stack(), example()
    fast = attnopt.optimize(model, Sparse(OWN), (x,), {"region_ids": ids[0]}, dynamic_shapes=shapes)
    x, ids = example(2, 31)
    want = oracle.run_edited(model, (x,), None, {i: under(visible(ids[:1], ids[:1])) for i in range(2)})
    oracle.assert_same(oracle.run(fast, (x,), {"region_ids": ids[0]}), want)


@pytest.mark.parametrize("shapes", ["auto", {"x": {1: torch.export.Dim("n")}}, {"x": {0: torch.export.Dim("b")}}])
def test_an_example_of_batch_one(shapes: Any) -> None:
    model, (x, ids) = Stack(), example(batch=1)
    fast = attnopt.optimize(model, Sparse(OWN), (x,), {"region_ids": ids}, dynamic_shapes=shapes)
    for batch, length in ((1, 31), (3, 12)):
        x, ids = example(batch, length)
        if shapes != "auto" and (0 in shapes["x"]) != (batch == 3):
            continue
        want = oracle.run_edited(model, (x,), None, {i: under(visible(ids, ids)) for i in range(2)})
        oracle.assert_same(oracle.run(fast, (x,), {"region_ids": ids}), want)


@pytest.mark.slow
def test_guidance_away_from_segments() -> None:
    model, (x, ids) = Stack(), example()
    guided = attnopt.guidance(model, Sparse(OWN), (x,), {"region_ids": ids}, scale=2.0)
    weak = oracle.run_edited(model, (x,), None, {i: under(visible(ids, ids)) for i in range(2)})[0]
    strong = oracle.run(model, (x,))[0]
    oracle.assert_same(oracle.run(guided, (x,), {"region_ids": ids}), [strong + 2.0 * (strong - weak)])


def test_a_model_that_takes_any_argument_gets_the_ids() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.kinds, self.attention = nn.Embedding(3, 32), Attention()

        def forward(self, x: Tensor, **others: Tensor) -> Tensor:
            return self.attention(x + self.kinds(others["kinds"]) if "kinds" in others else x)

    model, (x, ids) = Typed(), example(length=5)
    ids = ids.clamp(0, 2)
    fast = attnopt.optimize(model, Sparse(Segments(Input("kinds"))), (x,), {"kinds": ids})
    want = oracle.run_edited(model, (x,), {"kinds": ids}, {0: under(visible(ids, ids))})
    oracle.assert_differs(want, oracle.run_edited(model, (x,), None, {0: under(visible(ids, ids))}))
    oracle.assert_same(oracle.run(fast, (x,), {"kinds": ids}), want)


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_ids_of_tokens_beside_a_class_token(backend: str) -> None:
    """As many as the attention sees: no tensor of the model has that length when it is called."""

    class Classified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.token, self.attention = nn.Parameter(torch.randn(1, 1, 32)), Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))

    model, (x, _), (_, ids) = Classified(), example(length=5), example(length=6)
    fast = attnopt.optimize(
        model, Sparse(OWN), (x,), {"region_ids": ids}, dynamic_shapes={"x": {1: torch.export.Dim("n")}}, backend=backend
    )
    (x, _), (_, ids) = example(length=30), example(length=31)
    want = oracle.run_edited(model, (x,), None, {0: under(visible(ids, ids))})
    oracle.assert_same(oracle.run(fast, (x,), {"region_ids": ids}), want)
    for wrong in (1, 30, 32):
        with pytest.raises(attnopt.CaptureError, match=f"length {wrong} along axis 1, but the other inputs require 31"):
            fast(x, region_ids=torch.zeros(2, wrong, dtype=torch.int64))


def test_a_name_that_a_tensor_inside_another_argument_has() -> None:
    class Nested(Stack):
        def forward(self, x: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(x["of"] + x["ids"].unsqueeze(2))

    x, ids = example(length=5)
    with pytest.raises(attnopt.PolicyError, match="reads the input x_ids, but a tensor inside of another argument"):
        attnopt.optimize(Nested(), Sparse(Segments(Input("x_ids"))), ({"of": x, "ids": ids},), {"x_ids": ids})


def test_ids_for_all_sequences_beside_a_batch() -> None:
    """An axis of one element that nothing else has stays as it is."""
    model, (x, ids) = Attention(), example(length=5)
    fast = attnopt.optimize(model, Sparse(OWN), (x,), {"region_ids": ids[:1]}, dynamic_shapes="auto", strict=True)
    x, ids = example(3, 9)
    want = oracle.run_edited(model, (x,), None, {0: under(visible(ids[:1], ids[:1]))})
    oracle.assert_same(oracle.run(fast, (x,), {"region_ids": ids[:1]}), want)


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_pairs_of_large_numbers(backend: str, tmp_path: Path) -> None:
    """Ids as large as those of a vocabulary need no table of that size."""
    pairs = ((151644, 151645), (151645, 151645), (5, 7))
    model, (x, ids) = Attention(), example(length=5)
    numbers = torch.tensor([5, 7, 151644, 151645, -1, 151646])  # the last for ids of -1
    fast = attnopt.optimize(
        model,
        Sparse(Segments(Input("ids"), pairs)),
        (x,),
        {"ids": numbers[ids]},
        dynamic_shapes="auto",
        backend=backend,
    )
    assert max(p.numel() for p in fast.graph_module.buffers()) < 1000
    x, ids = example(3, 70)
    want = oracle.run_edited(model, (x,), None, {0: under(visible(numbers[ids], numbers[ids], [pairs] * HEADS))})
    given = {"ids": numbers[ids]}
    oracle.assert_same(oracle.run(fast, (x,), given), want)
    oracle.assert_same(run_onnx(fast, tmp_path / "m.onnx", {"x": x, **given}), want)


def test_bad_inputs_are_named() -> None:
    model, (x, ids) = Stack(), example()
    with pytest.raises(attnopt.PolicyError, match="reads the input region_ids, which is not among the example inputs"):
        attnopt.optimize(model, Sparse(OWN), (x,))
    for wrong, code in (
        (ids.float(), "not-ids"),
        (ids[:, :5], "wrong-length"),
        (ids[:, :, None], "wrong-length"),
        (3, "unknown-input"),
    ):
        with pytest.raises(attnopt.RewriteError, match=rf"\[{code}\]"):
            attnopt.optimize(model, Sparse(OWN), (x,), {"region_ids": wrong}, strict=True)
    fast = attnopt.optimize(model, Sparse(OWN), (x,), {"region_ids": ids}, dynamic_shapes="auto")
    with pytest.raises(attnopt.CaptureError, match="region_ids"):
        fast(x)
    with pytest.raises(attnopt.CaptureError, match="region_ids has length 11 along axis 1"):
        fast(x, region_ids=ids[:, 1:])
    with pytest.raises(attnopt.CaptureError, match="region_ids has dtype"):
        fast(x, region_ids=ids.float())
    with pytest.raises(attnopt.RewriteError, match="already-segmented"):
        attnopt.optimize(model, [Sparse(OWN), Sparse(OWN)], (x,), {"region_ids": ids}, strict=True)
    for policy, code in (([Sparse(OWN), PoolKeys(2)], "masked-pools"), ([PoolKeys(2), Sparse(OWN)], "already-pooled")):
        with pytest.raises(attnopt.RewriteError, match=rf"\[{code}\]"):
            attnopt.optimize(model, policy, (x,), {"region_ids": ids}, strict=True)
    with pytest.raises(attnopt.PolicyError, match="invalid name"):
        Input("two words")


@pytest.mark.parametrize(
    "pattern",
    [
        ~OWN,
        OWN | Window(1, 1),
        OWN & Segments(Input("others")),
        PerHead({0: OWN, 1: Segments(Input("others"))}),
        PerHead({0: OWN}, Window(1, 1)),
        PerHead({0: OWN}, Full()),
    ],
    ids=str,
)
def test_uses_that_are_not_supported_are_refused(pattern: Pattern) -> None:
    with pytest.raises(attnopt.PolicyError, match=r"not supported|need pairs"):
        Sparse(pattern)


def test_ids_that_no_call_brings_show_nothing() -> None:
    for ask in (lambda: OWN.mask(3, 3), lambda: OWN.density(3, 3), lambda: OWN.layout(3, 3)):
        with pytest.raises(attnopt.PolicyError, match="unknown until the model is called"):
            ask()
    with pytest.raises(attnopt.PolicyError, match="expected an Input beside one for the queries"):
        Segments([0, 1], keys=Input("words"))
    assert attnopt.patterns.parse(str(Segments(Input("a"), PAIRS, keys=Input("b")))) == Segments(
        Input("a"), PAIRS, keys=Input("b")
    )
