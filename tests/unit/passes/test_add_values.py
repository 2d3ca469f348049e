"""AddValues: against the user's model with its attention maps raised, where the masks of the model hide nothing."""

from __future__ import annotations

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
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt.errors import PolicyError
from attnopt.passes import (
    AddValues,
    DynamicSparse,
    GroupedQuery,
    HeadPatch,
    LocalWindow,
    PruneHeads,
    ScaleHeads,
    SoftPAG,
    Sparse,
)
from attnopt.patterns import PerHead, Window

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
EDITABLE = [
    s for s, _ in MUST_MATCH
    if not s.exponentials and s.softmax not in ("log", "again") and s.returns == "output" and s.heads >= 3
]  # fmt: skip
HIDDEN = -1e4
UNEVEN = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2)  # every size another
MASKED = [
    Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, mask=mask, cross=cross, **more)
    for mask in (("causal",), ("left", "padding"), ("padding",), ("causal", "float-padding"), ("far",))
    for cross in (False, True)
    for more in ({}, {"sinks": True})
    if not cross or mask == ("padding",)
]


def shown(model: Attention, given: dict[str, Tensor], tokens: Any) -> Tensor:
    """Bool [L, S] or [B, 1, L, S]: true at these keys for the queries that see them."""
    q_len, kv_len = given["x"].shape[1], given.get("memory", given["x"]).shape[1]
    seen = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for t in range(kv_len) if tokens is None else tokens:
        if -kv_len <= t < kv_len:
            seen[:, t] = True
    for kind in (k for k in model.s.mask if k != "given"):  # whose numbers are those of a bias
        seen = seen & model._visible(kind, q_len, kv_len, given.get("padding"))
    return seen


def by_hand(
    model: Attention,
    given: dict[str, Tensor],
    alphas: dict[int, float],
    tokens: Any,
    visible: Tensor | None = None,
    **more: Any,
) -> list[Tensor]:
    seen = shown(model, given, tokens)
    seen = seen if visible is None else seen & visible
    raised = tuple(alphas.get(h, 0.0) for h in range(model.s.heads))
    edit = oracle.Edit(raised=raised, shown=seen, visible=visible, **more)
    return oracle.run_edited(model, (), given, {0: edit})


# ---------------------------------------------------------------- the law
@pytest.mark.parametrize("tokens", [None, (1, -1, -4), range(2, 4)], ids=str)
@pytest.mark.parametrize("s", [*EDITABLE[::9], UNEVEN, *MASKED], ids=str)
def test_law_the_maps_are_raised_where_no_mask_hides(s: Spelling, tokens: Any) -> None:
    model, given = Attention(s), inputs(s, batch=3)
    fast = attnopt.optimize(model, AddValues(tokens, 0.7, [2, 0], HIDDEN), (), given)
    assert [site.status for site in fast.report.sites] == ["rewritten"], fast.report
    want = by_hand(model, given, {2: 0.7, 0: 0.7}, tokens)
    oracle.assert_same(oracle.run(fast, (), given), want)
    oracle.assert_differs(want, oracle.run(model, (), given))


def test_nothing_is_nothing() -> None:
    model, given = Attention(UNEVEN), inputs(UNEVEN)
    fused = attnopt.optimize(model, "fuse", (), given)
    for p in (AddValues([0], 0.0), AddValues([], 1.0), AddValues((), 1.0, [2])):
        fast = attnopt.optimize(model, p, (), given)
        assert fast.sites[0].spec == fused.sites[0].spec
        oracle.assert_same(oracle.run(fast, (), given), oracle.run(fused, (), given), limit=0.0)


def test_two_of_them_add() -> None:
    s = MASKED[0]
    model, given = Attention(s), inputs(s)
    fast = attnopt.optimize(model, [AddValues([0, 1], 0.5, [1]), AddValues([1, -1], -0.25, [1, 3])], (), given)
    first, second = (shown(model, given, t).float() for t in ((0, 1), (1, -1)))

    def raised(one: float, other: float) -> Tensor:
        return one * first + other * second

    q, k, v = (model._heads(given["x"], given["x"])[n].transpose(1, 2) for n in "qkv")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    A = (q @ k.mT * 5**-0.5).masked_fill(~shown(model, given, None), -torch.inf).softmax(-1)
    A[:, 1] += raised(0.5, -0.25)
    A[:, 3] += raised(0.0, -0.25)
    oracle.assert_same(oracle.run(fast, (), given), [model._projected((A @ v).transpose(1, 2))])


# ---------------------------------------------------------------- nothing leaks
@pytest.mark.parametrize("policy", [
    AddValues([4, -1], 3.0, hidden_below=HIDDEN), [AddValues(None, 3.0, hidden_below=HIDDEN), LocalWindow(1)],
    [LocalWindow(2), AddValues([1, 4], 3.0, hidden_below=HIDDEN)],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("mask", [("causal",), ("causal", "padding"), ("far",)])
def test_no_token_reaches_the_ones_before_it(policy: Any, mask: tuple[str, ...]) -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, mask=mask)
    model, given = Attention(s), inputs(s)
    fast = attnopt.optimize(model, policy, (), given)
    x = given["x"].requires_grad_()
    for query in range(7):
        (slope,) = torch.autograd.grad(fast(**{**given, "x": x})[:, query].square().sum(), x)
        assert bool(slope[:, : query + 1].any())
        assert not bool(slope[:, query + 1 :].any())


def test_padded_keys_are_never_added() -> None:
    s = Spelling(cross=True, mask=("padding",))
    model, given = Attention(s), inputs(s)
    fast = attnopt.optimize(model, AddValues([-1, 0], 3.0, hidden_below=HIDDEN), (), given)
    before = fast(**given)
    given["memory"][-1, -1] += 100.0  # hidden in the second text, seen in the first
    assert torch.equal(fast(**given), before)
    given["memory"][0, -1] += 1.0
    assert not torch.equal(fast(**given)[0], before[0])


@pytest.mark.parametrize("order", [1, -1])
def test_patterns_of_other_passes_hide_too(order: int) -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, mask=("padding",))
    model, given = Attention(s), inputs(s)
    pattern = PerHead({1: Window(1), 4: Window(2, 0)})
    mask = pattern.mask(7, 7, num_heads=6)
    passes = [AddValues([0, 3, -1], 0.5, [1, 2, 4], HIDDEN), Sparse(pattern)][::order]
    fast = attnopt.optimize(model, passes, (), given)
    o = oracle.run(fast, (), given)
    v = model._heads(given["x"], given["x"])["v"].transpose(1, 2).repeat_interleave(2, 1)
    seen = (shown(model, given, [0, 3, -1]) & mask[None]).float() * 0.5
    seen[:, [0, 3, 5]] = 0.0
    more = model._projected((seen @ v).transpose(1, 2)) - model.b_out
    plain = oracle.run_edited(model, (), given, {0: oracle.Edit(mask)})
    oracle.assert_same(o, [plain[0] + more])


# ---------------------------------------------------------------- sizes, files, other passes
@pytest.mark.parametrize("mask", mostly_slow([(), ("causal",), ("padding",), ("left", "padding")], ("left", "padding")))
def test_positions_at_every_length(mask: tuple[str, ...], tmp_path: Path) -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, mask=mask)
    model, given, tokens = Attention(s), inputs(s, length=8), (0, 4, 5, -1, -6)
    fast = attnopt.optimize(model, AddValues(tokens, 0.5, [4, 5], HIDDEN), (), given, dynamic_shapes="auto")
    (entry,) = fast.report.sites
    assert (
        entry.notes[-1]
        == "add-values: sequences of fewer than 6 tokens lack some of the positions, which are ignored there"
    )
    assert "0.5 times the values of tokens 0, 4 to 5, -6 and -1 added to heads 4, 5" in entry.spec_after
    fast.export_onnx(tmp_path / "m.onnx")
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert [site.spec for site in loaded.sites] == [site.spec for site in fast.sites]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for length, batch in ((8, 2), (5, 3), (6, 1), (2, 2), (19, 4)):
        other = inputs(s, length=length, batch=batch)
        want = by_hand(model, other, {4: 0.5, 5: 0.5}, tokens)
        oracle.assert_same(oracle.run(fast, (), other), want)
        oracle.assert_same(oracle.run(loaded, (), other), oracle.run(fast, (), other), limit=0.0)
        (found,) = session.run(None, {i.name: other[i.name].numpy() for i in session.get_inputs()})
        oracle.assert_same([torch.from_numpy(found)], want)


def test_with_other_passes() -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, mask=("left",))
    model, given = Attention(s), inputs(s)
    add, gains = AddValues([1, -1], 0.5, [1, 2]), (1.0, 3.0, 1.0, -1.0, 1.0, 1.0)
    for policy, alphas, factors in (
        ([add, ScaleHeads(gains)], {1: 0.5, 2: 0.5}, gains),
        ([ScaleHeads(gains), add], {1: 0.5 / 3, 2: 0.5}, gains),
        ([add, PruneHeads(heads=[0, 1])], {2: 0.5}, (0, 0, 1, 1, 1, 1)),
        ([PruneHeads(heads=[0, 1]), add], {2: 0.5}, (0, 0, 1, 1, 1, 1)),
        ([add, HeadPatch([2])], {1: 0.5}, (1, 1, 0, 1, 1, 1)),
    ):
        fast = attnopt.optimize(model, policy, (), given)
        oracle.assert_same(
            oracle.run(fast, (), given), by_hand(model, given, alphas, [1, -1], gains=tuple(factors)), str(policy)
        )
    pag = attnopt.optimize(model, [add, SoftPAG([1], 0.5)], (), given)
    want = by_hand(model, given, {1: 0.25, 2: 0.5}, [1, -1], own=(0.0, 0.5, 0.0, 0.0, 0.0, 0.0))
    oracle.assert_same(oracle.run(pag, (), given), want)


@pytest.mark.slow
class _OfRows(nn.Module):
    """Padding hides whole rows: a mask of queries alone, [B, 1, L, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.alpha = 0.0
        self.tokens: list[int] | slice = [0]

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        rows = seen[:, None, :, None]
        maps = (q @ k.mT / 2).masked_fill(~rows, -torch.inf).softmax(-1).masked_fill(~rows, 0.0)
        o = maps @ v + self.alpha * rows * v[:, :, self.tokens].sum(2, keepdim=True)
        made: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return made


@pytest.mark.parametrize("tokens", [[0, 3], None])
def test_a_mask_of_whole_rows_hides_every_key(tokens: list[int] | None) -> None:
    model = _OfRows().eval()
    given = (torch.randn(2, 7, 12), torch.tensor([[True] * 7, [True] * 4 + [False] * 3]))
    fast = attnopt.optimize(model, AddValues(tokens, 0.5), given, dynamic_shapes="auto")
    assert fast.report.sites[0].status == "rewritten"
    model.alpha, model.tokens = 0.5, slice(None) if tokens is None else tokens
    for n in (7, 11):
        other = (torch.randn(2, n, 12), torch.arange(n) < torch.tensor([[n], [4]]))
        oracle.assert_same(oracle.run(fast, other), oracle.run(model, other))


def test_merged_heads_add_their_shared_values() -> None:
    model, x = tiny_models.Attention(16, 4, causal=False), torch.randn(2, 12, 16)
    shared = tiny_models.Attention(16, 4, causal=False)
    shared.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in (*shared.k.parameters(), *shared.v.parameters()):
            groups = p.view(2, 2, 4, -1)
            groups.copy_(groups.mean(1, keepdim=True).expand_as(groups))
    marked = torch.zeros(12, 12, dtype=torch.bool)
    marked[:, [0, 11]] = True
    want = oracle.run_edited(shared, (x,), None, {0: oracle.Edit(raised=(0.0, 0.5, 0.0, 0.5), shown=marked)})
    for order in (1, -1):
        fast = attnopt.optimize(model, [GroupedQuery(kv_heads=2), AddValues([0, -1], 0.5, [1, 3])][::order], (x,))
        oracle.assert_same(oracle.run(fast, (x,)), want)


class Cached(nn.Module):
    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        both = torch.cat([past, x], 1)
        q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x, both))
        L, S = q.shape[2], k.shape[2]
        seen = torch.arange(S) <= (torch.arange(L) + (S - L))[:, None]
        return ((q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ k).transpose(1, 2).flatten(2)


def test_positions_count_the_tokens_in_a_cache() -> None:
    model, free = Cached(), torch.export.Dim.AUTO
    args = torch.randn(2, 4, 6), torch.randn(2, 5, 6)
    fast = attnopt.optimize(
        model, AddValues((1, 7, -1), 0.5, [1]), args, dynamic_shapes={"x": {1: free}, "past": {1: free}}
    )
    for new, old in ((4, 5), (1, 9), (9, 1), (2, 3)):
        x, past = torch.randn(2, new, 6), torch.randn(2, old, 6)
        want, both = model(x, past), torch.cat([past, x], 1)
        for t in {t % (new + old) for t in (1, 7, -1) if t < new + old}:
            want[:, max(t - old, 0) :, 3:] += 0.5 * both[:, t, None, 3:]
        oracle.assert_same([fast(x, past)], [want])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbart", "qwen3"])
def test_law_in_models(name: str) -> None:
    model, args, kwargs = zoo.BY_NAME[name].build()
    fast = attnopt.optimize(model, AddValues([1, -2], 0.5, [3, 1], HIDDEN), args, kwargs)
    assert all(s.status == "rewritten" for s in fast.report.sites), fast.report
    seen = [s.spec.visible_pattern.mask(s.q_len, s.kv_len)[0] for s in fast.sites]
    for one in seen:
        one[:, [i for i in range(one.shape[1]) if i not in (1, one.shape[1] - 2)]] = False

    def edit(n: int, _: tuple[int, ...]) -> oracle.Edit:
        return oracle.Edit(raised=(0.0, 0.5, 0.0, 0.5), shown=seen[n])

    want = oracle.run_edited(model, args, kwargs, edit)
    oracle.assert_same(oracle.run(fast, args, kwargs), want)
    oracle.assert_differs(want, oracle.run(model, args, kwargs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mask", [(), ("causal",), ("padding",)])
def test_other_dtypes(dtype: torch.dtype, mask: tuple[str, ...]) -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, mask=mask, apply="masked_fill")
    model, given = Attention(s).to(dtype), inputs(s)
    given["x"] = given["x"].to(dtype)
    fast = attnopt.optimize(model, AddValues([0, 2], 0.5, [1, 4], HIDDEN), (), given)
    oracle.assert_same(oracle.run(fast, (), given), by_hand(model, given, {1: 0.5, 4: 0.5}, [0, 2]))


# ---------------------------------------------------------------- options and refusals
def test_policies_read_back(tmp_path: Path) -> None:
    for p in (AddValues([-1, 3], 0.5), AddValues(None, -2, [2, 1]), AddValues(range(2, 5), 1.0)):
        policy = attnopt.Policy.of(p)
        assert attnopt.Policy.from_json(policy.to_json()) == policy
    same = attnopt.Policy.of(AddValues([0, -1], 0.5, [1]))
    assert attnopt.Policy.of("add-values(tokens=[0, -1], alpha=0.5, heads=[1])") == same
    (tmp_path / "p.yaml").write_text('"*": [{pass: add-values, tokens: [-1, 0], alpha: 0.5, heads: [1]}]')
    assert attnopt.Policy.of(str(tmp_path / "p.yaml")) == same


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddValues([0], float("nan")), "invalid value alpha=nan: expected a finite number"),
        (lambda: AddValues([0], float("inf")), "invalid value alpha=inf"),
        (lambda: AddValues([0], wrong("1")), "invalid value alpha='1'"),
        (lambda: AddValues(wrong("last"), 1.0), "invalid value tokens='last'"),
        (lambda: AddValues(wrong([True]), 1.0), "invalid value tokens=True"),
        (lambda: AddValues([0], 1.0, []), "invalid value heads=[]: expected at least one head, each listed once"),
        (lambda: AddValues([0], 1.0, [1, 1]), "invalid value heads=[1, 1]"),
        (lambda: AddValues([0], 1.0, [-1]), "invalid value heads=-1"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert message in str(caught.value)


def test_what_is_refused() -> None:
    assert refusal(AddValues([0], 1.0, [4]), a_site()).startswith(
        "[unknown-head] expected heads from 0 to 3, found head 4"
    )
    told = refusal(AddValues([14, 15, -16], 1.0), a_site(kv_len=15))
    assert told.startswith("[unknown-token] expected tokens from -15 to 14, found tokens 15 and -16")
    assert refusal(AddValues([0], 1.0), a_site(has_bias=True)) == (
        "[unknown-mask] expected keys that a pattern or a boolean mask hides, found a bias, which may hide some (at "
        "model.py:88)\n  hint: say which of its numbers do, as in hidden_below=-1e3"
    )
    assert "[unknown-mask]" in refusal(AddValues([0], 1.0), applied(DynamicSparse(), a_site()))
    added = applied(AddValues([0], 1.0), a_site())
    assert refusal(DynamicSparse(), added) == (
        "[already-edited] expected head outputs that are not edited yet, found 1 times the values of token 0 added to heads 0, "
        "1, 2, 3 (at model.py:88)\n  hint: exclude the site from dynamic-sparse, or leave the edit out: chosen blocks would hide "
        "its keys"
    )
    assert "[already-edited]" not in str(DynamicSparse().check(applied(SoftPAG(), a_site())))
    pruned = applied(PruneHeads(heads=[1]), a_site())
    assert applied(AddValues([0], 1.0, [1]), pruned).spec == pruned.spec


def test_a_bias_needs_its_hidden_numbers() -> None:
    for s in (Spelling(bias_kind="alibi"), Spelling(mask=("given",))):
        model, given = Attention(s), inputs(s)
        (site,) = attnopt.inspect(model, (), given).sites
        assert "add-values" not in site.refusals
        with pytest.warns(attnopt.AttnoptWarning, match="unknown-mask"):
            fast = attnopt.optimize(model, AddValues([0], 1.0), (), given)
        assert fast.report.sites[0].status == "refused"
        oracle.assert_same(oracle.run(fast, (), given), oracle.run(model, (), given))


@pytest.mark.parametrize("apply", ["add-inf", "add-min", "lerp", "masked_fill"])
def test_masks_that_are_added_hide(apply: str) -> None:
    s = Spelling(mask=("padding", "left"), apply=apply, bias_kind="table")
    model, given = Attention(s), inputs(s)
    fast = attnopt.optimize(model, AddValues([2, -1], 3.0, [0, 3], HIDDEN), (), given)
    oracle.assert_same(oracle.run(fast, (), given), by_hand(model, given, {0: 3.0, 3: 3.0}, [2, -1]))
