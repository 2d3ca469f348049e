"""Steer: against the user's model with the shift put into its head outputs by hand."""

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
from steering import steered
from torch import Tensor, nn

import attnopt
from attnopt.errors import ConversionError, PolicyError
from attnopt.ir.head_additions import Shifted
from attnopt.passes import AddValues, GroupedQuery, HeadPatch, LocalWindow, PruneHeads, RouteHeads, ScaleHeads, Steer

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEERABLE = [s for s, _ in MUST_MATCH if s.heads >= 3 and s.returns in ("output", "heads")]
UNEVEN = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2)  # every size another


def deltas(s: Spelling, heads: list[int], seed: int = 0) -> Tensor:
    return torch.randn(len(heads), s.value_dim, generator=torch.Generator().manual_seed(seed))


def by_hand(model: Attention, given: dict[str, Tensor], by: dict[int, Tensor], tokens: Any = None) -> list[Tensor]:
    with steered(model, by, tokens):
        return oracle.run(model, (), given)


# ---------------------------------------------------------------- the law
@pytest.mark.parametrize("tokens", [None, (1, -1), range(2, 5)], ids=str)
@pytest.mark.parametrize(
    "s", [*STEERABLE[::11], UNEVEN, Spelling(cross=True, mask=("padding",)), Spelling(bias=False)], ids=str
)
def test_law_steering_is_the_shift_by_hand(s: Spelling, tokens: Any) -> None:
    model, given, by = Attention(s), inputs(s, batch=3), deltas(s, [2, 0])
    fast = attnopt.optimize(model, Steer(by, [2, 0], tokens), (), given)
    want = by_hand(model, given, {2: by[0], 0: by[1]}, tokens)
    assert [site.status for site in fast.report.sites] == ["rewritten"]
    oracle.assert_same(oracle.run(fast, (), given), want)
    oracle.assert_differs(want, oracle.run(model, (), given))


@pytest.mark.parametrize("s", [UNEVEN, Spelling(returns="heads"), Spelling(out=False), Spelling(bias=False)], ids=str)
def test_all_tokens_cost_nothing_where_the_output_projection_has_a_bias(s: Spelling) -> None:
    model, given, by = Attention(s), inputs(s), deltas(s, [1])
    fast, fused = (attnopt.optimize(model, p, (), given) for p in (Steer(by[0], [1]), "fuse"))
    own, plain = ([n.target for n in m.graph_module.graph.nodes if n.op == "call_function"] for m in (fast, fused))
    assert (own == plain) == (s.bias and s.out and s.returns == "output"), "folded where nothing else reads the outputs"
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in model.parameters())
    oracle.assert_same(oracle.run(fast, (), given), by_hand(model, given, {1: by[0]}))
    oracle.assert_same(oracle.run(model, (), given), oracle.run(fused, (), given))


def test_one_delta_for_every_head() -> None:
    s = UNEVEN
    model, given, by = Attention(s), inputs(s), deltas(s, [0])[0]
    for p in (Steer(by), Steer(by.tolist()), Steer(by.expand(6, -1)), Steer(by, [5, 0, 1, 2, 3, 4])):
        fast = attnopt.optimize(model, p, (), given)
        oracle.assert_same(oracle.run(fast, (), given), by_hand(model, given, dict.fromkeys(range(6), by)))


def test_nothing_is_nothing() -> None:
    model, given = Attention(UNEVEN), inputs(UNEVEN)
    fused = attnopt.optimize(model, "fuse", (), given)
    for p in (Steer(torch.zeros(2)), Steer(torch.zeros(2), [1], [0]), Steer(torch.ones(2), [1], [])):
        fast = attnopt.optimize(model, p, (), given)
        assert fast.sites[0].spec == fused.sites[0].spec
        oracle.assert_same(oracle.run(fast, (), given), oracle.run(fused, (), given), limit=0.0)
    some = applied(Steer(torch.tensor([[0.0] * 3, [1.0] * 3]), [2, 1]), a_site()).spec.after
    assert [edit.changed for edit in some] == [(1,)]


def test_weights_that_two_calls_share() -> None:
    model, x = Twice(), torch.randn(3, 7, 12)
    by = deltas(Spelling(), [1])[0]
    with steered(model.attention, {1: by}, time=2):
        want = oracle.run(model, (x,))
    fast = attnopt.optimize(model, {"attention#2": Steer(by, [1])}, (x,))
    oracle.assert_same(oracle.run(fast, (x,)), want)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(Spelling())

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x + self.attention(x))


# ---------------------------------------------------------------- where tokens are
def test_positions_at_every_length(tmp_path: Path) -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, mask=("causal",))
    model, by = Attention(s), deltas(s, [4])
    given, tokens = inputs(s, length=8), (0, 4, 5, -1, -6)
    fast = attnopt.optimize(model, Steer(by, [4], tokens), (), given, dynamic_shapes="auto")
    (entry,) = fast.report.sites
    assert (
        entry.notes[-1] == "steer: sequences of fewer than 6 tokens lack some of the positions, which are ignored there"
    )
    assert "head 4 shifted at tokens 0, 4 to 5, -6 and -1" in entry.spec_after
    fast.export_onnx(tmp_path / "m.onnx")
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert [site.spec for site in loaded.sites] == [site.spec for site in fast.sites]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for length, batch in ((8, 2), (5, 3), (6, 1), (2, 2), (19, 4)):
        other = inputs(s, length=length, batch=batch)
        want = by_hand(model, other, {4: by[0]}, tokens)
        oracle.assert_same(oracle.run(fast, (), other), want)
        oracle.assert_same(oracle.run(loaded, (), other), oracle.run(fast, (), other), limit=0.0)
        (found,) = session.run(None, {session.get_inputs()[0].name: other["x"].numpy()})
        oracle.assert_same([torch.from_numpy(found)], want)


class Cached(nn.Module):
    """Keys and values of earlier tokens come first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_models.Attention(16, 4)

    def forward(self, x: Tensor, k_past: Tensor, v_past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.inner.q, self.inner.k, self.inner.v))
        k, v = torch.cat([k_past, k], 2), torch.cat([v_past, v], 2)
        L, S = q.shape[2], k.shape[2]
        seen = torch.arange(S) <= (torch.arange(L) + (S - L))[:, None]
        o = (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self.inner.o(o.transpose(1, 2).flatten(2)), k, v


@pytest.mark.parametrize("tokens", [(0, 3, 5, 8), (-1, -2), (4, -3)], ids=str)
def test_positions_count_the_tokens_in_a_cache(tokens: tuple[int, ...]) -> None:
    model, by = Cached(), torch.randn(4)
    x, past = torch.randn(2, 4, 16), [torch.randn(2, 4, 5, 4) for _ in "kv"]
    free = torch.export.Dim.AUTO
    shapes = {"x": {1: free}, "k_past": {2: free}, "v_past": {2: free}}
    fast = attnopt.optimize(model, Steer(by, [1], tokens), (x, *past), dynamic_shapes=shapes)
    assert fast.sites[0].alignment == "last"
    W = model.inner.o.weight[:, 4:8]
    for new, old in ((4, 5), (1, 8), (9, 0), (3, 2)):
        args = (torch.randn(2, new, 16), torch.randn(2, 4, old, 4), torch.randn(2, 4, old, 4))
        want, k, v = model(*args)
        rows = {t % (new + old) - old for t in tokens if -new - old <= t < new + old}
        for row in (r for r in rows if r >= 0):
            want[:, row] += W @ by
        oracle.assert_same(oracle.run(fast, args), [want, k, v])


# ---------------------------------------------------------------- with other passes
@pytest.mark.parametrize("tokens", [None, (0, -1)], ids=str)
def test_with_gains_and_patches(tokens: Any) -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2)
    model, given, by = Attention(s), inputs(s), deltas(s, [1, 2])
    gains, patch = {1: 3.0, 2: -2.0, 4: 0.5}, torch.randn(1, 2)
    for policy, edited, moved in (
        ([ScaleHeads(gains), Steer(by, [1, 2], tokens)], gains, {1: by[0], 2: by[1]}),
        ([Steer(by, [1, 2], tokens), ScaleHeads(gains)], gains, {1: by[0] * 3, 2: by[1] * -2}),
        ([Steer(by, [1, 2], tokens), Steer(by, [2, 4], tokens)], {}, {1: by[0], 2: by[0] + by[1], 4: by[1]}),
        ([Steer(by, [1, 2], tokens), HeadPatch([2])], {2: 0.0}, {1: by[0]}),
        ([HeadPatch([2]), Steer(by, [1, 2], tokens)], {2: 0.0}, {1: by[0], 2: by[1]}),
        ([Steer(by, [1, 2], tokens), PruneHeads(heads=[1, 3])], {1: 0.0, 3: 0.0}, {2: by[1]}),
        ([PruneHeads(heads=[1, 3]), Steer(by, [1, 2], tokens)], {1: 0.0, 3: 0.0}, {2: by[1]}),
        ([Steer(by, [1, 2], tokens), LocalWindow(20), ScaleHeads(gains), Steer(by, [4, 1], tokens)], gains,
         {1: by[0] * 3 + by[1], 2: by[1] * -2, 4: by[0]}),
    ):  # fmt: skip
        fast = attnopt.optimize(model, policy, (), given)
        factors = tuple(edited.get(h, 1.0) for h in range(6))
        with steered(model, moved, tokens):
            want = oracle.run_edited(model, (), given, {0: oracle.Edit(gains=factors)})
        oracle.assert_same(oracle.run(fast, (), given), want, str(policy))
    fast = attnopt.optimize(model, [HeadPatch([2], patch), Steer(by, [1, 2], tokens)], (), given)
    with steered(model, {1: by[0], 2: by[1] + patch[0]} if tokens is None else {1: by[0], 2: by[1]}, tokens):
        patched = {2: patch[0]} if tokens is not None else {}
        with steered(model, patched):
            want = oracle.run_edited(model, (), given, {0: oracle.Edit(gains=(1, 1, 0, 1, 1, 1))})
    oracle.assert_same(oracle.run(fast, (), given), want)
    assert (not [n for n, _ in fast.graph_module.named_buffers() if "constant" in n]) == (tokens is None)


@pytest.mark.slow
def test_a_route_silences_what_was_added_before_it() -> None:
    model, x, by = tiny_models.Attention(16, 4), torch.randn(2, 12, 16), torch.randn(4)
    policy = [Steer(by), RouteHeads([0], 1), Steer(by, [2])]
    found = [attnopt.optimize(model, policy, (x,), backend=b)(x) for b in ("reference", "auto")]
    routed = attnopt.optimize(model, RouteHeads([0], 1), (x,), backend="reference")
    q = model.q(x).unflatten(-1, (4, -1)).norm(dim=-1)[..., 1:]
    used = torch.nn.functional.one_hot(q.argmax(-1) + 1, 4).bool()
    used[..., 0] = True
    more = (used[..., None] * by).float()
    more[..., 2, :] += by
    want = routed(x) + more.flatten(2) @ model.o.weight.T
    oracle.assert_same([found[0]], [want])
    oracle.assert_same([found[1]], [want])


def test_sharing_keys_comes_before_steering() -> None:
    steered_site = applied(Steer(torch.ones(3), [1]), a_site())
    assert refusal(GroupedQuery(kv_heads=2), steered_site).endswith(
        "found head 1 shifted (at model.py:88)\n  hint: apply grouped-query before heads are routed, replaced or steered"
    )
    assert applied(Steer(torch.ones(3), [1]), applied(GroupedQuery(kv_heads=2), a_site())).spec.num_kv_heads == 2


def test_inside_the_users_class() -> None:
    model, x, by = tiny_models.Attention(16, 4), torch.randn(2, 12, 16), torch.randn(4)
    converted = attnopt.convert(model, Steer(by, [2]), (x,))
    assert type(converted) is type(model)
    oracle.assert_same([converted(x)], [model(x) + model.o.weight[:, 8:12] @ by])
    with pytest.raises(ConversionError, match="edits of its head outputs cannot be folded"):
        attnopt.convert(model, Steer(by, [2], [0]), (x,))
    with pytest.raises(ConversionError, match="edits of its head outputs cannot be folded"):
        attnopt.convert(model, AddValues([0], 0.5), (x,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbart", "starcoder2"])
def test_law_in_models(name: str) -> None:
    model, args, kwargs = zoo.BY_NAME[name].build()
    sites = attnopt.inspect(model, args, kwargs).sites
    by = torch.randn(2, sites[0].value_dim, generator=torch.Generator().manual_seed(3))
    for tokens, rows in ((None, slice(None)), ([0, -2], [0, -2])):
        handles = []
        for site in sites:
            weight = site.projections["out"].weight
            assert weight is not None

            def hook(_: nn.Module, given: tuple[Tensor], rows: Any = rows) -> tuple[Tensor]:
                z = given[0].unflatten(-1, (-1, by.shape[1])).clone()
                z[:, rows, 3] += by[0]
                z[:, rows, 1] += by[1]
                return (z.flatten(-2),)

            handles.append(model.get_submodule(weight.rpartition(".")[0]).register_forward_pre_hook(hook))
        want = oracle.run(model, args, kwargs)
        for handle in handles:
            handle.remove()
        fast = attnopt.optimize(model, Steer(by, [3, 1], tokens), args, kwargs)
        oracle.assert_same(oracle.run(fast, args, kwargs), want)
        oracle.assert_differs(want, oracle.run(model, args, kwargs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_other_dtypes(dtype: torch.dtype, bias: bool) -> None:
    s = Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, bias=bias)
    model, given, by = Attention(s).to(dtype), {"x": inputs(s)["x"].to(dtype)}, deltas(s, [1])
    for tokens in (None, (2, -1)):
        fast = attnopt.optimize(model, Steer(by.double(), [1], tokens), (), given)
        oracle.assert_same(oracle.run(fast, (), given), by_hand(model, given, {1: by[0]}, tokens))
        assert {p.dtype for p in fast.parameters()} == {dtype}


# ---------------------------------------------------------------- options and refusals
def test_policies_read_back(tmp_path: Path) -> None:
    for p in (Steer(torch.randn(2, 3), [2, 1]), Steer([0.1, 2]), Steer(torch.randn(3).half(), None, range(2, 5))):
        policy = attnopt.Policy.of(p)
        assert attnopt.Policy.from_json(policy.to_json()) == policy
    same = Steer([0.5, -1.0], [1], [-1, 0])
    assert attnopt.Policy.of("steer(delta=[0.5, -1.0], heads=[1], tokens=[0, -1])") == attnopt.Policy.of(same)
    (tmp_path / "p.yaml").write_text('"*": [{pass: steer, delta: [0.5, -1.0], heads: [1], tokens: [-1, 0]}]')
    assert attnopt.Policy.of(str(tmp_path / "p.yaml")) == attnopt.Policy.of(same)
    assert same.tokens == (-1, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Steer(torch.tensor([1.0, torch.nan])),
            "invalid delta of shape [2]\n  hint: use finite floating-point",
        ),
        (lambda: Steer([1.0, float("inf")]), "invalid delta [1.0, inf]"),
        (lambda: Steer(torch.ones(3, dtype=torch.long)), "invalid delta of shape [3]"),
        (lambda: Steer(torch.zeros(())), "invalid delta of shape []"),
        (lambda: Steer(torch.zeros(1, 2, 3)), "invalid delta of shape [1, 2, 3]"),
        (lambda: Steer(torch.zeros(3, 2), [1, 0]), "numbers, [Dv] or [2, Dv]"),
        (lambda: Steer(torch.zeros(0)), "invalid delta of shape [0]"),
        (lambda: Steer(wrong("x")), "invalid delta 'x'"),
        (lambda: Steer(wrong(7)), "invalid delta 7"),
        (lambda: Steer([[1.0], [1.0, 2.0]]), "invalid delta [[1.0], [1.0, 2.0]]"),
        (lambda: Steer(wrong({"dtype": "float32"})), "invalid delta {'dtype': 'float32'}"),
        (lambda: Steer([1.0], []), "invalid value heads=[]: expected at least one head, each listed once"),
        (lambda: Steer([1.0], [1, 1]), "invalid value heads=[1, 1]: expected at least one head, each listed once"),
        (lambda: Steer([1.0], [-1]), "invalid value heads=-1"),
        (lambda: Steer([1.0], None, wrong([0.5])), "invalid value tokens=0.5"),
        (lambda: Steer([1.0], None, wrong("last")), "invalid value tokens='last'"),
        (lambda: Steer([1.0], None, range(10**9)), "expected at most 1000000 positions"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert message in str(caught.value)


def test_what_is_refused() -> None:
    ones = torch.ones(3)
    assert refusal(Steer(ones, [4]), a_site()).startswith("[unknown-head] expected heads from 0 to 3, found head 4")
    assert "[other-sizes] expected a delta of 3 features, found a delta of 4" in refusal(Steer(torch.ones(4)), a_site())
    assert "[other-sizes] expected one delta for all heads, or one for each of the 4, found 2" in refusal(
        Steer(torch.ones(2, 3)), a_site()
    )
    told = refusal(Steer(ones, [0], [3, -13, 12]), a_site())
    assert told.startswith("[unknown-token] expected tokens from -12 to 11, found tokens 12 and -13")
    assert "[unknown-token]" in refusal(Steer(ones, [0], [12]), a_site(is_dynamic=True))
    assert applied(Steer(ones, [0], [11, -12]), a_site(kv_len=40, is_cross=True)).spec.after
    pruned = applied(PruneHeads(heads=[1]), a_site())
    assert applied(Steer(ones, [1]), pruned).spec == pruned.spec
    (edit,) = applied(Steer(torch.arange(12.0).view(4, 3)), pruned).spec.after
    assert isinstance(edit, Shifted)
    assert edit.heads == (0, 2, 3)
    assert edit.by.tensor()[1].tolist() == [6.0, 7.0, 8.0]
    assert Steer.typical() is None
