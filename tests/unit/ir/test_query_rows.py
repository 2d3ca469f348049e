"""Rows that are chosen: which, by what they receive, and that every backend computes these alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import a_site, wrong
from specs import PATTERNS, a_spec, tensors
from torch import Tensor

import attnopt
from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.errors import PluginError, PolicyError
from attnopt.ir import received_weights as received
from attnopt.ir.interfaces import Backend, Rewrite
from attnopt.ir.plugin_calls import asked, attention_of
from attnopt.ir.query_rows import ChosenRows
from attnopt.ir.row_attention import row_parts
from attnopt.ir.row_scores import Norm, Received, RowScores
from attnopt.ir.spec_rules import broken_rules
from attnopt.patterns import Full, Pattern, PerHead, Window

KEEPS = st.integers(1, 9) | st.floats(0.01, 1.0)


def by_hand(scores: list[float], real: list[bool], keep: float | int, prefix: int) -> set[int]:
    """The chosen rows of one sequence: in the order of their scores, of equal ones the first; NaN is the highest."""
    free = [i for i in range(prefix, len(scores)) if real[i]]
    rank = sorted(free, key=lambda i: (-math.inf if math.isnan(scores[i]) else -scores[i], i))
    count = keep if isinstance(keep, int) else math.ceil(round(keep, 6) * len(free) - 1e-9)
    return {*range(min(prefix, len(scores))), *rank[:count]}


def attended(spec: attnopt.AttentionSpec, t: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The outputs of all rows and the weights, written out."""
    pick = list(spec.kv_of_head)
    s = spec.scale * t["q"] @ t["k"][:, pick].mT
    s = s if spec.softcap is None else spec.softcap * (s / spec.softcap).tanh()
    s = s if t["bias"] is None else s + t["bias"]
    seen = spec.pattern.mask(s.shape[2], s.shape[3], num_heads=spec.num_heads).expand(s.shape)
    seen = seen if t["mask"] is None else seen & t["mask"]
    e = (s - s.masked_fill(~seen, -1e30).amax(-1, keepdim=True)).exp() * seen
    total = e.sum(-1, keepdim=True)
    if t["sinks"] is not None:
        total = total + (t["sinks"] - s.masked_fill(~seen, -1e30).amax(-1, keepdim=True)).exp()
    p = torch.where(seen.any(-1, keepdim=True), e / total, 0.0)
    return p @ t["v"][:, pick], p


def run(backend: Backend, spec: attnopt.AttentionSpec, given_: dict[str, Any]) -> Tensor:
    t = dict(given_)
    return attention_of(backend, spec)(t.pop("q"), t.pop("k"), t.pop("v"), **t)


# ---------------------------------------------------------------- who is chosen
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_by_hand(data: st.DataObject) -> None:
    """Ties, NaN, infinities, padding on either side, a prefix longer than the sequence."""
    L, prefix, keep = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 4)), data.draw(KEEPS)
    some = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, math.nan, math.inf, -math.inf, 1e-40])
    lists = data.draw(st.lists(st.lists(some, min_size=L, max_size=L), min_size=3, max_size=3))
    real = data.draw(st.none() | st.lists(st.lists(st.booleans(), min_size=L, max_size=L), min_size=3, max_size=3))
    rows = ChosenRows(Norm(), keep, prefix, (0,))
    marks = None if real is None else torch.tensor(real)
    of_all = rows.choose(torch.tensor(lists), marks)
    of_heads = rows.choose(
        torch.tensor(lists)[:, None].flip(0).repeat(1, 2, 1), None if marks is None else marks.flip(0)
    )
    assert of_all.index.shape == (3, 1, rows.count(L))
    for b in range(3):
        want = by_hand(lists[b], [True] * L if real is None else real[b], keep, prefix)
        assert {i for i, c in enumerate(of_all.chosen[b, 0].tolist()) if c} == want
        assert torch.equal(of_heads.chosen[2 - b], of_all.chosen[b].expand(2, -1))
        index = of_all.index[b, 0].tolist()
        assert index[: len(want)] == sorted(want)
        assert len({*index}) == len(index)


def test_a_share_is_rounded_up_but_not_by_rounding() -> None:
    for L, keep, want in ((10, 0.1, 1), (11, 0.1, 2), (100, 0.07, 7), (3, 1e-9, 1), (1000, 0.333333, 334), (7, 1.0, 7)):
        assert ChosenRows(Norm(), keep, 0, (0,)).count(L) == want
        assert int(ChosenRows(Norm(), keep, 0, (0,)).choose(torch.randn(1, L), None).chosen.sum()) == want
    assert [ChosenRows(Norm(), 2, 1, (0,)).count(L) for L in (1, 2, 3, 9)] == [1, 2, 3, 3]


# ---------------------------------------------------------------- what tokens receive
CASES = st.fixed_dictionaries(
    {
        "pattern": st.sampled_from([p for p in PATTERNS if not p.is_causal]),
        "kv_of_head": st.sampled_from([(0, 1, 2, 3), (0, 0, 1, 1), (1, 0, 1, 0)]),
        "softcap": st.sampled_from([None, 1.5]),
        "has_bias": st.booleans(),
        "has_mask": st.booleans(),
        "has_sinks": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(CASES, st.integers(0, 99), st.sampled_from([1, 60, 200, 1 << 18]))
def test_received_weights_are_sums_of_columns(case: dict[str, Any], seed: int, held: int) -> None:
    spec = a_spec(**case)
    t = tensors(spec, 2, 9, 9, torch.float64, seed)
    _, p = attended(spec, t)
    seen = spec.pattern.mask(9, 9, num_heads=4)[None]
    mask = seen if t["mask"] is None else seen & t["mask"]
    senders = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) < 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(received, "_HELD", held)
        for who in (None, senders, senders[:1]):
            options = (spec.kv_of_head, spec.scale, spec.softcap)
            got = received.received_weights(t["q"], t["k"], t["bias"], mask, t["sinks"], who, *options)
            counted = p if who is None else p * who[:, None, :, None]
            torch.testing.assert_close(got, counted.sum(2))


def test_no_map_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    own = received.written_out

    def watched(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        nonlocal most
        most = max(most, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return own(q, k, *others)

    monkeypatch.setattr(received, "written_out", watched)
    q, k = torch.randn(2, 1, 4, 2048, 8).unbind()
    received.received_weights(q, k, None, None, None, None, (0, 1, 2, 3), 0.3, None)
    assert 0 < most <= 1 << 18 < 4 * 2048**2


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    bias, mask, sinks = torch.randn(1, 4, 5, 7), torch.rand(2, 1, 5, 7) < 0.7, torch.randn(1, 4, 1, 1)
    for given_ in ((None, None, None, None), (bias, mask, sinks, torch.ones(2, 5, dtype=torch.bool))):
        torch.library.opcheck(received.RECEIVED, (q, k, *given_, (0, 0, 1, 1), 0.5, None))


# ---------------------------------------------------------------- every backend
def per_head(q: Tensor, k: Tensor, **_: Any) -> Tensor:
    return q.float().sum(-1)


SCORES: list[Any] = [Norm(), Received(), Received(3), per_head]


@settings(max_examples=120, deadline=None)
@given(
    CASES, st.sampled_from(SCORES), KEEPS, st.integers(0, 2), st.sets(st.integers(0, 3), min_size=1), st.integers(0, 99)
)
def test_it_equals_all_rows_with_zeros_by_hand(
    case: dict[str, Any], scores: Any, keep: float | int, prefix: int, heads: set[int], seed: int
) -> None:
    """In double precision, in the reference and gathered on every backend that takes the spec."""
    L = 9
    spec = a_spec(**case, rows=ChosenRows(scores, keep, prefix, tuple(heads)))
    t = tensors(spec, 3, L, L, torch.float64, seed)
    o, p = attended(spec, t)
    some = sorted(heads)
    real = torch.ones(3, L, dtype=torch.bool) if t["mask"] is None else t["mask"].any(2).any(1)
    if scores == Norm():
        rank = t["q"][:, some].square().sum((1, 3))
    elif isinstance(scores, Received):
        votes = (p[:, some] * real[:, None, :, None])[:, :, :: scores.stride].sum((1, 2))
        mean = votes.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        rank = ((votes / mean.clamp(min=1e-300)).clamp(min=1e-300).log() * 4096).round()
    else:
        rank = t["q"][:, some].float().sum(-1)
    rank = rank.unsqueeze(1).expand(-1, len(some), -1) if rank.dim() == 2 else rank
    want = o.clone()
    for b in range(3):
        for n, h in enumerate(some):
            kept = by_hand(rank[b, n].tolist(), real[b].tolist(), keep, prefix)
            want[b, h, [i for i in range(L) if i not in kept]] = 0.0
    for backend in (Reference(), Gathered(), Sdpa(), Blocked()):
        if backend.check(spec) is None:
            torch.testing.assert_close(run(backend, spec, t), want, msg=lambda m, b=backend: f"{b.name}: {m}")


class Gathered(Reference):
    """The reference as a backend that is given only the chosen rows."""

    rows = False


def test_only_the_chosen_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, ...]] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, *others: Any, **options: Any) -> Tensor:
        rows.append(tuple(q.shape))
        return own(q, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    spec = a_spec(rows=ChosenRows("norm", 0.25, 1, (0, 2)))
    t = tensors(spec, 2, 41, 41, torch.float32, 0)
    run(Sdpa(), spec, t)
    assert sorted(rows) == [(2, 2, 11, 8), (2, 2, 41, 8)]
    site = replace(a_site(4, q_len=41, kv_len=41), spec=spec)
    assert [(s.q_len, s.num_heads, s.spec.rows) for s in asked(Sdpa(), site)] == [(11, 2, None), (41, 2, None)]
    assert [s.q_len for s in asked(Reference(), site)] == [41]


def test_gradients() -> None:
    spec = a_spec(kv_of_head=(0, 0, 1, 1), rows=ChosenRows("received", 0.5, 1, (0, 1, 3)), pattern=Window(4))
    t = tensors(spec, 2, 7, 7, torch.float64, 3)
    found = []
    for backend in (Reference(), Sdpa(), Blocked()):
        leaves = [x.clone().requires_grad_() for x in (t["q"], t["k"], t["v"])]  # type: ignore[union-attr]
        o = attention_of(backend, spec)(*leaves, bias=None, mask=None, sinks=None)
        found.append(torch.autograd.grad(o.square().sum(), leaves))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["mask", "bias"])
@pytest.mark.parametrize("scores", [Norm(), Received(), Received(2)])
def test_padding_changes_nothing(side: str, form: str, scores: RowScores) -> None:
    """A sequence gives the same alone and beside a longer one, whatever stands in its padding: 6 tokens, so that every other
    query is the same."""
    spec = a_spec(rows=ChosenRows(scores, 0.5, 0, (0, 1, 2, 3), bias_hides=form == "bias"))
    alone = tensors(spec, 1, 7, 7, torch.float64, 1)
    padding = {name: 50 * torch.randn(1, 4, 6, 8, dtype=torch.float64) for name in "qkv"}
    order = (lambda a, b: torch.cat([b, a], 2)) if side == "left" else (lambda a, b: torch.cat([a, b], 2))
    t = {name: order(alone[name], padding[name]) for name in "qkv"}
    real = order(torch.ones(1, 1, 7, dtype=torch.bool), torch.zeros(1, 1, 6, dtype=torch.bool))[:, :, None]
    given_ = {**t, "bias": None, "mask": None, "sinks": None}
    if form == "mask":
        spec_padded, given_["mask"] = replace(spec, has_mask=True), real
    else:
        spec_padded = replace(spec, has_bias=True)
        given_["bias"] = torch.where(real, 0.0, torch.finfo(torch.float32).min).double()
    at = slice(6, None) if side == "left" else slice(0, 7)
    for backend in (Reference(), Sdpa(), Blocked()):
        made = run(backend, spec_padded, given_)
        torch.testing.assert_close(made[:, :, at], run(backend, spec, alone))
        assert int((made != 0).any(3).any(1).sum()) == 4


def test_where_all_keys_are_equally_hidden_all_rows_compete() -> None:
    """-3e38 on every key hides none, as in the softmax; -inf on every key hides all."""
    rows = ChosenRows("norm", 0.5, 0, (0, 1, 2, 3), bias_hides=True)
    t = tensors(a_spec(), 2, 6, 6, torch.float32, 1)
    plain = run(Reference(), a_spec(rows=rows), t)
    for hidden, alone in ((torch.finfo(torch.float32).min, plain), (-torch.inf, torch.zeros_like(plain))):
        bias = torch.full((2, 1, 1, 6), hidden)
        for backend in (Reference(), Sdpa()):
            made = run(backend, a_spec(has_bias=True, rows=rows), {**t, "bias": bias})
            assert ((made != 0).any(3) == (alone != 0).any(3)).all()


def test_in_cross_attention_a_mask_tells_of_queries() -> None:
    """Keys that are hidden are not the queries' padding; a query that sees nothing is."""
    spec = a_spec(is_cross=True, has_mask=True, rows=ChosenRows("norm", 0.5, 0, (0, 1, 2, 3)))
    t = tensors(spec, 1, 6, 9, torch.float64, 1)
    mask = torch.ones(1, 1, 6, 9, dtype=torch.bool)
    mask[..., 4:] = False
    for blind in ([], [0, 5]):
        mask[:, :, blind] = False
        real = [i not in blind for i in range(6)]
        want = by_hand(t["q"].square().sum((1, 3))[0].tolist(), real, 0.5, 0)  # type: ignore[union-attr]
        for backend in (Reference(), Sdpa()):
            made = run(backend, spec, {**t, "mask": mask})
            assert {*made.abs().sum((0, 1, 3)).nonzero().flatten().tolist()} == want


# ---------------------------------------------------------------- as values
@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([Norm(), Received(), Received(7)]), KEEPS, st.integers(0, 3), st.sets(st.integers(0, 4), min_size=1),
    st.sets(st.integers(0, 4), min_size=1), st.booleans(),
)  # fmt: skip
def test_notation_and_heads(
    scores: RowScores, keep: float | int, prefix: int, heads: set[int], kept: set[int], hides: bool
) -> None:
    rows = ChosenRows(scores, keep, prefix, tuple(heads), hides)
    assert ChosenRows.from_json(rows.to_json()) == rows
    assert repr(ChosenRows.from_json(rows.to_json())) == repr(rows)
    left = a_spec(5, rows=rows).keeping(kept).rows
    both = tuple(sorted(kept & heads))
    assert left == (replace_heads(rows, both) if both else None)


def replace_heads(rows: ChosenRows, heads: tuple[int, ...]) -> ChosenRows:
    return ChosenRows(rows.scores, rows.keep, rows.prefix, heads, rows.bias_hides)


def test_texts() -> None:
    assert (
        str(ChosenRows("norm", 0.25, 1, (0, 1, 2)))
        == "heads 0 to 2 compute the first row and 25% of the others by Norm()"
    )
    assert str(ChosenRows("received(2)", 64, 0, (1,))) == "head 1 computes 64 of the rows by Received(stride=2)"
    assert str(ChosenRows("Received", 0.5, 2, (0, 2))).startswith(
        "heads 0 and 2 compute the first 2 rows and 50% of the others"
    )
    assert str(ChosenRows(per_head, 3, 0, (0,))).endswith("by per_head")
    assert "head 0 computes 50% of the rows by Norm()" in str(a_spec(rows=ChosenRows("norm", 0.5, 0, (0,))))
    assert a_spec(rows=ChosenRows("norm", 0.5, 0, (0,))).chooses


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"keep": 0}, "ChosenRows: invalid value keep=0: expected an integer from 1"),
        ({"keep": 0.0}, "ChosenRows: invalid value keep=0.0: expected a fraction above 0 and at most 1.0"),
        ({"keep": 1.5}, "ChosenRows: invalid value keep=1.5: expected a fraction above 0 and at most 1.0"),
        ({"keep": math.nan}, "ChosenRows: invalid value keep=nan: expected a finite number"),
        ({"keep": True}, "ChosenRows: invalid value keep=True: expected an integer from 1"),
        ({"keep": "half"}, "ChosenRows: invalid value keep='half': expected an integer from 1"),
        ({"prefix": -1}, "ChosenRows: invalid value prefix=-1"),
        ({"scores": "rollout"}, "unknown row score 'rollout'"),
        ({"scores": "received(0)"}, "Received: invalid value stride=0"),
        ({"scores": 3}, "ChosenRows: invalid value score=3: expected row scores, their text, or a function"),
        ({"scores": Norm}, "expected row scores, their text, or a function"),
    ],
)
def test_bad_options(options: dict[str, Any], why: str) -> None:
    with pytest.raises(PolicyError) as caught:
        ChosenRows(**{"scores": "norm", "keep": 0.5, "heads": (0,), **options})
    assert why in str(caught.value)


def test_texts_of_files_name_only_scores() -> None:
    for text in ("Norm()", "ChosenRows(scores=Pooled(), keep=1)", "ChosenRows(scores=__import__('os'), keep=1)", "1"):
        with pytest.raises(PolicyError):
            ChosenRows.from_json(text)


@pytest.mark.parametrize(
    ("gives", "got"),
    [
        (lambda q, k, **_: q[..., 0].sum(), "float32 []"),
        (lambda q, k, **_: q.sum((1, 3)).long(), "int64 [2, 9]"),
        (lambda q, k, **_: q[:, :3, :, 0], "float32 [2, 3, 9]"),
        (lambda q, k, **_: q[:, 0, 1:, 0], "float32 [2, 8]"),
        (lambda q, k, **_: [1.0], "list"),
    ],
)
def test_scores_of_a_wrong_shape(gives: Any, got: str) -> None:
    spec = a_spec(rows=ChosenRows(gives, 0.5, 0, (0, 1, 2, 3)))
    with pytest.raises(PluginError) as caught:
        run(Sdpa(), spec, tensors(spec, 2, 9, 9, torch.float32, 0))
    assert f"gave {got}, expected a floating-point tensor [2, 9] or [2, 4, 9]" in str(caught.value)


def test_a_function_that_fails_is_told_how_it_is_called() -> None:
    spec = a_spec(rows=ChosenRows(lambda q, k: q, 0.5, 0, (0,)))  # type: ignore[misc]
    with pytest.raises(PluginError, match=r"failed: TypeError: (.|\n)*it is called as score\(q, k, real_BL="):
        run(Sdpa(), spec, tensors(spec, 2, 9, 9, torch.float32, 0))


RULES: list[tuple[dict[str, Any], str]] = [
    ({"rows": wrong("half")}, "rows is 'half', expected ChosenRows or None"),
    ({"rows": ChosenRows("norm", 2, 0, (7,))}, "rows names heads (7,), expected some heads of (0, 1, 2, 3)"),
    ({"rows": ChosenRows("norm", 2, 0, ())}, "rows names heads (), expected some heads of"),
    ({"pattern": Window(2, 0)}, "which depends on the whole sequence, but the attention is causal"),
    ({"selection": attnopt.DynamicBlocks()}, "rows and a selection of blocks cannot be computed together"),
    ({"pooling": attnopt.PooledKeys(2, [1])}, "rows and pooling cannot be computed together"),
]


@pytest.mark.parametrize(("changes", "why"), RULES)
def test_rules(changes: dict[str, Any], why: str) -> None:
    site = a_site()
    made = replace(site.spec, **{"rows": ChosenRows("norm", 2, 0, (1,)), **changes})
    assert any(why in broken for broken in broken_rules(site, Rewrite(made)))
    assert not [*broken_rules(site, Rewrite(replace(site.spec, rows=ChosenRows("norm", 2, 0, (1,)))))]


def test_parts() -> None:
    pattern: Pattern = PerHead({0: Window(1), 3: Window(2)})
    spec = a_spec(kv_of_head=(0, 0, 1, 1), pattern=pattern, rows=ChosenRows("norm", 2, 0, (1, 3)))
    others, rows = row_parts(spec)
    assert (others.places, others.kv_places, others.spec.pattern) == ((0, 2), (0, 1), PerHead({0: Window(1)}))
    assert (rows.places, rows.kv_places, rows.spec.pattern, rows.spec.has_mask) == ((1, 3), (0, 1), Full(), True)
    assert (others.q_len(50), rows.q_len(50)) == (50, 2)
