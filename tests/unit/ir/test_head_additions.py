"""Edits that add to head outputs, against attention written out with its map."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import tensors
from torch import Tensor

from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.ir.constant import Constant
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.edit_registry import edit_from_json
from attnopt.ir.head_additions import Shifted, ValuesAdded, without_shifts
from attnopt.ir.head_edits import HeadEdit, Replaced, Scaled, TowardValues, constant_heads
from attnopt.ir.head_routing import Routed
from attnopt.ir.mixed_maps import Mixed
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.spec_rules import verify_spec
from attnopt.patterns import Causal, Full, PerHead, Sinks, Strided, Window

B, L, H, D, Dv = 2, 5, 4, 6, 3
LOW = -0.5  # hides about a third of random numbers
TOKENS = st.none() | st.sets(st.integers(-8, 8), max_size=4).map(lambda s: tuple(sorted(s)))
HEADS = st.lists(st.integers(0, H - 1), min_size=1, max_size=H, unique=True).map(tuple)
PATTERNS = (
    Full(),
    Causal(),
    Window(1),
    Causal() & (Window(2, 0) | Sinks(1)),
    Strided(2),
    PerHead({(0, 2): Causal(), 3: Window(1)}),
)


@dataclass(frozen=True)
class Case:
    spec: AttentionSpec
    given: dict[str, Any]
    keys: int


@st.composite
def cases(draw: st.DrawFn, kv_lens: tuple[int, ...] = (L, 7)) -> Case:
    kv_of_head = draw(st.sampled_from([(0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0)]))
    spec = AttentionSpec(
        tuple(range(H)), tuple(range(max(kv_of_head) + 1)), kv_of_head, D, Dv, 0.4,
        pattern=draw(st.sampled_from(PATTERNS)), has_mask=draw(st.booleans()), has_bias=draw(st.booleans()),
    )  # fmt: skip
    keys = draw(st.sampled_from(kv_lens))
    return Case(spec, tensors(spec, B, L, keys, torch.float64, draw(st.integers(0, 99))), keys)


def shifts(draw_tokens: st.SearchStrategy[Any] = TOKENS) -> st.SearchStrategy[Shifted]:
    def made(heads: tuple[int, ...], tokens: tuple[int, ...] | None, seed: int, after_past: bool) -> Shifted:
        by = torch.randn(len(heads), Dv, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Shifted(heads, Constant.of(by), tokens, after_past)

    return st.builds(made, HEADS, draw_tokens, st.integers(0, 99), st.booleans())


additions = st.builds(ValuesAdded, HEADS, st.floats(-2, 2), TOKENS, st.just(LOW))


@st.composite
def mixtures(draw: st.DrawFn) -> Mixed:
    heads = draw(HEADS)
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    maps = torch.randn(draw(st.sampled_from([1, len(heads)])), L, L, generator=random, dtype=torch.float64)
    gates = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=len(heads), max_size=len(heads)))
    return Mixed(heads, tuple(gates), Constant.of(maps))


gains = st.dictionaries(st.integers(0, H - 1), st.floats(-2, 2), min_size=1).map(lambda g: Scaled(tuple(g.items())))
others = st.one_of(
    gains,
    st.dictionaries(st.integers(0, H - 1), st.floats(0, 1), min_size=1).map(lambda g: TowardValues(tuple(g.items()))),
    HEADS.map(lambda heads: Replaced(heads, Constant.of(torch.arange(1.0 * len(heads) * Dv).reshape(len(heads), Dv)))),
    mixtures(),
)


def seen_keys(c: Case) -> Tensor:
    """Bool [B, H, L, S], pair by pair: the keys whose values may be added."""
    pattern = c.spec.pattern.mask(L, c.keys, num_heads=H).expand(H, -1, -1)
    seen = torch.zeros(B, H, L, c.keys, dtype=torch.bool)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, seen.shape)).tolist():
        mask, bias = c.given["mask"], c.given["bias"]
        seen[b, h, i, j] = (
            pattern[h, i, j] and (mask is None or mask[b, 0, i, j]) and (bias is None or bias[0, h, i, j] > LOW)
        )
    return seen


def maps(c: Case) -> tuple[Tensor, Tensor]:
    """The attention maps [B, H, L, S], and the values of each query head [B, H, S, Dv]."""
    k, v = (c.given[n][:, list(c.spec.kv_of_head)] for n in ("k", "v"))
    scores, mask = c.spec.scale * c.given["q"] @ k.mT + (c.given["bias"] if c.spec.has_bias else 0.0), c.given["mask"]
    seen = (
        c.spec.pattern.mask(L, c.keys, num_heads=H)
        if mask is None
        else c.spec.pattern.mask(L, c.keys, num_heads=H) & mask
    )
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0), v


def by_hand(c: Case, edits: list[HeadEdit]) -> Tensor:
    """Head outputs with the edits, one element of the map or one row of the output after the other."""
    A, v = maps(c)
    seen, o = seen_keys(c), A @ v
    for edit in edits:
        match edit:
            case Scaled(given):
                for h, g in given:
                    o[:, h] *= g
            case ValuesAdded(heads, alpha, tokens, _):
                for h in heads:
                    more = torch.zeros_like(A[:, h])
                    for t in range(c.keys) if tokens is None else tokens:
                        if -c.keys <= t < c.keys:
                            more[..., t] = alpha * seen[:, h, :, t].double()  # an entry is raised once
                    o[:, h] += more @ v[:, h]
            case Shifted(heads, by, tokens, after_past):
                past, total = (c.keys - L, c.keys) if after_past else (0, L)
                rows = range(total) if tokens is None else {t % total for t in tokens if -total <= t < total}
                for n, h in enumerate(heads):
                    for row in (r - past for r in rows if r >= past):
                        o[:, h, row] += by.tensor()[n]
            case TowardValues(amounts):
                for h, u in amounts:
                    o[:, h] = (1 - u) * o[:, h] + u * v[:, h]
            case Mixed(heads, gates, held):
                for n, h in enumerate(heads):
                    own = held.tensor()[n if held.shape[0] > 1 else 0]
                    for b in range(B):
                        o[b, h] = (1 - gates[n]) * o[b, h] + gates[n] * (own @ v[b, h])
            case Replaced(heads, values):
                for n, h in enumerate(heads):
                    o[:, h] = values.tensor()[n]
            case _:
                raise AssertionError(edit)
    return o


def computed(c: Case, edits: list[HeadEdit], backend: Any = None) -> Tensor:
    t = dict(c.given)
    spec = replace(c.spec, after=tuple(edits))
    return attention_of(backend or Reference(), spec)(t.pop("q"), t.pop("k"), t.pop("v"), **t)


# ---------------------------------------------------------------- what they compute
@given(cases(), st.lists(shifts() | additions | gains, min_size=1, max_size=3))
@settings(deadline=None)
def test_law_they_equal_the_edit_by_hand(c: Case, edits: list[HeadEdit]) -> None:
    torch.testing.assert_close(computed(c, edits), by_hand(c, edits))


@given(cases((L,)), shifts(st.none()), shifts(st.none()), TOKENS)
@settings(deadline=None)
def test_law_two_shifts_add(c: Case, one: Shifted, other: Shifted, tokens: tuple[int, ...] | None) -> None:
    one, other = replace(one, tokens=tokens), replace(other, tokens=tokens)
    both = torch.zeros(H, Dv, dtype=torch.float64)
    for shift in (one, other):
        both[list(shift.heads)] += shift.by.tensor()
    together = Shifted(tuple(range(H)), Constant.of(both), tokens)
    torch.testing.assert_close(computed(c, [one, other]), computed(c, [together]))
    torch.testing.assert_close(computed(c, [one, other]), computed(c, [other, one]))


@given(cases(), shifts() | additions, gains)
@settings(deadline=None)
def test_law_gains_before_leave_what_is_added_and_gains_after_scale_it(c: Case, edit: HeadEdit, scaled: Scaled) -> None:
    g = torch.tensor([dict(scaled.gains).get(h, 1.0) for h in range(H)], dtype=torch.float64).reshape(1, H, 1, 1)
    plain = computed(c, [])
    more = computed(c, [edit]) - plain
    before = c.spec.scaled(dict(scaled.gains)).followed_by(edit)
    after = c.spec.followed_by(edit).scaled(dict(scaled.gains))
    torch.testing.assert_close(computed(c, list(before.after)), g * plain + more)
    torch.testing.assert_close(computed(c, list(after.after)), g * (plain + more))


@given(cases((L,)), st.lists(shifts(st.none()) | others | shifts() | additions, min_size=2, max_size=6))
@settings(deadline=None)
def test_law_shifts_of_all_tokens_move_to_the_end(c: Case, edits: list[HeadEdit]) -> None:
    left, added = without_shifts(edits)
    assert not [e for e in left if isinstance(e, Shifted) and e.tokens is None]
    more = torch.stack([added.get(h, torch.zeros(Dv, dtype=torch.float64)) for h in range(H)])[None, :, None]
    torch.testing.assert_close(computed(c, list(left)) + more, by_hand(c, edits))
    assert not any(isinstance(a, Scaled) and isinstance(b, Scaled) for a, b in pairwise(left)), "gains are one edit"


@given(st.lists(others | shifts(st.none()) | shifts() | additions, min_size=2, max_size=5), cases((L,)))
@settings(deadline=None)
def test_law_constant_heads_are_constant(edits: list[HeadEdit], c: Case) -> None:
    o = by_hand(c, edits)
    for h, value in constant_heads(edits).items():
        torch.testing.assert_close(o[:, h], value.expand(B, L, Dv))


def test_shifts_before_a_route_stay() -> None:
    shift = Shifted((0, 1), Constant.of(torch.ones(2, Dv)))
    route = Routed((0,), (1, 2, 3), 1)
    assert without_shifts([shift, route])[0] == (shift, route)
    left, added = without_shifts([shift, route, replace(shift, heads=(2, 3))])
    assert left == (shift, route)
    assert set(added) == {2, 3}


def test_a_shift_of_a_constant_head_is_constant() -> None:
    shift = Shifted((1, 2), Constant.of(torch.ones(2, 2)))
    patch = Replaced((1,), Constant.of(torch.tensor([[3.0, 4.0]])))
    assert {h: v.tolist() for h, v in constant_heads([patch, shift]).items()} == {1: [4.0, 5.0]}
    assert constant_heads([patch, replace(shift, tokens=(0,))]) == {}
    assert constant_heads([patch, ValuesAdded((1,), 1.0)]) == {}
    assert set(constant_heads([patch, ValuesAdded((2,), 1.0), replace(shift, heads=(0, 2), tokens=(0,))])) == {1}


def test_untouched_rows_keep_their_bits() -> None:
    c = Case(AttentionSpec.of(H, H, D, Dv, scale=0.4), {}, L)
    given = {n: None if t is None else t.half() for n, t in tensors(c.spec, B, L, L, torch.float64, 0).items()}
    c = replace(c, given=given)
    plain = computed(c, [])
    moved = computed(c, [Shifted((1,), Constant.of(torch.randn(1, Dv)), (1, -1)), ValuesAdded((2,), 0.5, (0,))])
    assert torch.equal(moved[:, [0, 3]], plain[:, [0, 3]])
    assert torch.equal(moved[:, 1, [0, 2, 3]], plain[:, 1, [0, 2, 3]])
    assert moved.dtype == torch.float16


# ---------------------------------------------------------------- as values
EDITS: list[HeadEdit] = [
    Shifted((2, 0), Constant.of(torch.randn(2, Dv))),
    Shifted((1,), Constant.of(torch.randn(1, Dv).bfloat16()), (-1, 0), after_past=True),
    ValuesAdded((3, 1), 0.5, (-2, 0, 1)),
    ValuesAdded((0,), -1.5),
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_edits_read_back(edit: HeadEdit) -> None:
    assert edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit
    assert hash(edit) == hash(edit_from_json(edit.to_json()))


@pytest.mark.parametrize("backend", [Sdpa(), Blocked()], ids=lambda b: b.name)
def test_every_backend(backend: Any) -> None:
    spec = AttentionSpec.of(H, 2, D, Dv, scale=0.4, pattern=Causal())
    wide = Case(spec, tensors(spec, B, L, L, torch.float64, 0), L)
    narrow = replace(wide, given={n: None if t is None else t.float() for n, t in wide.given.items()})
    found = computed(narrow, EDITS, backend)
    torch.testing.assert_close(found.double(), by_hand(wide, EDITS), rtol=1e-4, atol=1e-4)


def test_heads_that_stay() -> None:
    shift, add = EDITS[0], EDITS[2]
    assert isinstance(shift, Shifted)
    assert shift.keeping([0, 1]) == Shifted((0,), Constant.of(shift.by.tensor()[1:]))
    assert shift.keeping([1, 3]) is None
    assert add.keeping([1, 2]) == ValuesAdded((1,), 0.5, (-2, 0, 1))
    assert add.keeping([0]) is None


@given(cases(), st.lists(shifts() | additions, min_size=1, max_size=3), HEADS)
@settings(deadline=None)
def test_law_removed_heads_take_nothing_along(c: Case, edits: list[HeadEdit], kept: tuple[int, ...]) -> None:
    whole = reduce(AttentionSpec.followed_by, edits, c.spec)
    spec = whole.keeping(kept)
    groups = [c.spec.kv_heads.index(g) for g in spec.kv_heads]
    t = {**c.given, "q": c.given["q"][:, list(spec.heads)], **{n: c.given[n][:, groups] for n in ("k", "v")}}
    t["bias"] = None if t["bias"] is None else t["bias"][:, list(spec.heads)]
    o = attention_of(Reference(), spec)(t.pop("q"), t.pop("k"), t.pop("v"), **t)
    torch.testing.assert_close(o, by_hand(c, list(whole.after))[:, list(spec.heads)])


def test_texts() -> None:
    assert [str(e) for e in EDITS] == [
        "heads 2, 0 shifted", "head 1 shifted at tokens 0 and -1",
        "0.5 times the values of tokens 0 to 1 and -2 added to heads 3, 1",
        "-1.5 times the values of all tokens added to head 0",
    ]  # fmt: skip


def test_what_does_not_fit() -> None:
    spec = AttentionSpec.of(H, H, D, Dv, scale=0.4).having(bias=True)
    with pytest.raises(ValueError, match="hidden_below does not say"):
        computed(Case(spec, tensors(spec, B, L, L, torch.float64, 0), L), [EDITS[2]])
    for shape in ((2, 1, Dv), (1, Dv)):
        with pytest.raises(ValueError, match="a shift of shape"):
            Shifted((0, 1), Constant.of(torch.zeros(shape)))
    spec = AttentionSpec.of(H, H, D, Dv, scale=0.4)
    chosen = replace(spec.followed_by(EDITS[2]), selection=DynamicBlocks())
    assert list(verify_spec(spec, chosen)) == [
        f"the edit {EDITS[2]} reads which keys are hidden, but {chosen.selection} hides keys at run time"
    ]
