"""Edits that read what each call brings: the same as the edit made by hand in the user's model, everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
from call_models import HEADS, SIZE, Stack
from torch import Tensor, nn
from torch.export import Dim
from variants import mostly_slow

import attnopt
from attnopt import Input
from attnopt.passes import HeadPatch, MixMap, PruneHeads, ScaleHeads, Sparse, Steer
from attnopt.patterns import Segments

pytestmark = pytest.mark.usefixtures("one_capture")

Change = Callable[[Tensor, Tensor], Tensor]  # head outputs and values [B, H, L, D] -> new outputs


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@contextmanager
def by_hand(model: Stack, change: Change) -> Iterator[None]:
    """Inside, the outputs of the heads of both attentions are changed on their way into the output projection."""
    values: dict[nn.Module, Tensor] = {}
    hooks = []
    for layer in (model.first, model.second):
        hooks.append(layer.v.register_forward_hook(lambda m, _, out: values.__setitem__(m, heads_of(out))))
        hooks.append(
            layer.o.register_forward_pre_hook(
                lambda _, given, v=layer.v: (change(heads_of(given[0]), values[v]).transpose(1, 2).flatten(2),)
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def wanted(model: Stack, x: Tensor, change: Change) -> list[Tensor]:
    with by_hand(model, change):
        return oracle.run(model, (x,))


def run_onnx(fast: attnopt.OptimizedModel, file: Path, feed: Mapping[str, Tensor]) -> list[Tensor]:
    fast.export_onnx(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == set(feed)
    return [torch.from_numpy(o) for o in session.run(None, {n: x.numpy() for n, x in feed.items()})]


def x_of(batch: int, length: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, length, HEADS * SIZE)


def steered(o: Tensor, delta: Tensor, heads: tuple[int, ...]) -> Tensor:
    o = o.clone()
    o[:, list(heads)] += delta if delta.dim() == 4 else delta[:, :, None]
    return o


def patched(o: Tensor, values: Tensor, heads: tuple[int, ...]) -> Tensor:
    o = o.clone()
    for i, h in enumerate(heads):
        o[:, h] = values[:, i] if values.dim() == 4 else values[:, i, None]
    return o


def mixed(o: Tensor, v: Tensor, maps: Tensor, heads: tuple[int, ...], gate: float) -> Tensor:
    o = o.clone()
    for i, h in enumerate(heads):
        o[:, h] = (1 - gate) * o[:, h] + gate * maps[:, i if maps.shape[1] > 1 else 0] @ v[:, h]
    return o


def at(o: Tensor, new: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """``new`` at these tokens, ``o`` at the others."""
    chosen = torch.zeros(o.shape[2], dtype=torch.bool)
    chosen[[t for t in tokens if t < o.shape[2]]] = True
    return torch.where(chosen[:, None], new, o)


# policy, the shape of what a call brings for (batch, length), the change by hand
CASES: dict[str, tuple[Any, Callable[[int, int], tuple[int, ...]], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "steer": (Steer(Input("given"), [2, 0]), lambda B, L: (B, 2, SIZE), lambda o, v, x: steered(o, x, (2, 0))),
    "steer, one for the batch": (
        Steer(Input("given"), [1]), lambda B, L: (1, 1, SIZE), lambda o, v, x: steered(o, x, (1,)),
    ),
    "steer each token": (
        Steer(Input("given")), lambda B, L: (B, HEADS, L, SIZE), lambda o, v, x: steered(o, x, (0, 1, 2, 3)),
    ),
    "steer some tokens": (
        Steer(Input("given"), [3], tokens=[0, 2]), lambda B, L: (B, 1, SIZE), lambda o, v, x: at(o, steered(o, x, (3,)), (0, 2)),
    ),
    "patch": (
        HeadPatch([1, 3], Input("given")), lambda B, L: (B, 2, L, SIZE), lambda o, v, x: patched(o, x, (1, 3)),
    ),
    "patch all tokens alike": (
        HeadPatch([3, 1], Input("given")), lambda B, L: (B, 2, SIZE), lambda o, v, x: patched(o, x, (3, 1)),
    ),
    "mix": (
        MixMap(Input("given"), 0.25, [0, 2]), lambda B, L: (B, 2, L, L), lambda o, v, x: mixed(o, v, x, (0, 2), 0.25),
    ),
    "mix one map": (
        MixMap(Input("given"), 1.0), lambda B, L: (1, 1, L, L), lambda o, v, x: mixed(o, v, x, (0, 1, 2, 3), 1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", mostly_slow(CASES, "steer", "patch", "mix"))
def test_law_they_are_the_edit_by_hand_at_every_size(case: str, tmp_path: Path) -> None:
    policy, shape, change = CASES[case]
    model, x = Stack(), x_of(2, 9)
    given = torch.randn(shape(2, 9))
    fast = attnopt.optimize(model, policy, (x,), {"given": given}, dynamic_shapes="auto")
    assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
    for batch, length in ((2, 9), (3, 14)):
        x, given = x_of(batch, length, seed=1), torch.randn(shape(batch, length))
        want = wanted(model, x, lambda o, v, given=given: change(o, v, given))  # type: ignore[misc]
        oracle.assert_differs(want, oracle.run(model, (x,)))
        oracle.assert_same(oracle.run(fast, (x,), {"given": given}), want)
        oracle.assert_same(run_onnx(fast, tmp_path / "m.onnx", {"x": x, "given": given}), want)
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert torch.equal(loaded(x, given=given), fast(x, given=given))
    assert [s.spec for s in loaded.sites] == [s.spec for s in fast.sites]
    assert torch.equal(copy.deepcopy(fast)(x, given=given), fast(x, given=given))


def test_what_removed_heads_would_have_read_is_not_read() -> None:
    model, x, delta = Stack(), x_of(2, 9), torch.randn(2, HEADS, SIZE)
    keep = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]
    for policy in (
        [PruneHeads(heads=[0, 2]), Steer(Input("given"))],
        [Steer(Input("given")), PruneHeads(heads=[0, 2])],
    ):
        fast = attnopt.optimize(model, policy, (x,), {"given": delta})
        changed = delta.clone()
        changed[:, [0, 2]] = torch.nan
        want = wanted(model, x, lambda o, v: (o + delta[:, :, None]) * keep)
        oracle.assert_same(oracle.run(fast, (x,), {"given": changed}), want)


def test_one_input_at_several_places() -> None:
    """Two edits of each attention, and segments beside them."""
    model, x, given = Stack(), x_of(2, 9), torch.randn(2, 2, SIZE)
    ids = torch.randint(0, 2, (2, 9))
    policy = [Sparse(Segments(Input("ids"))), Steer(Input("given"), [0, 1]), Steer(Input("given"), [2, 3])]
    fast = attnopt.optimize(
        model, policy, (x,), {"given": given, "ids": ids}, dynamic_shapes="auto", backend="sdpa"
    )  # whose operators are an attention that is found again
    assert "segments by ids" in fast.report.sites[0].spec_after
    for batch, length in ((2, 9), (3, 14)):
        x, given, ids = x_of(batch, length), torch.randn(batch, 2, SIZE), torch.randint(0, 2, (batch, length))
        seen = (ids[:, :, None] == ids[:, None, :])[:, None].expand(-1, HEADS, -1, -1)
        edits = {i: oracle.Edit(seen, weights=lambda p: p.nan_to_num(0.0)) for i in range(2)}
        both = given.repeat(1, 2, 1)[:, :, None]
        with by_hand(model, lambda o, v, both=both: o + both):  # type: ignore[misc]
            want = oracle.run_edited(model, (x,), None, edits)
        oracle.assert_same(oracle.run(fast, (x,), {"given": given, "ids": ids}), want)
    again = attnopt.optimize(fast, "fuse", (x,), {"given": given, "ids": ids})
    oracle.assert_same(oracle.run(again, (x,), {"given": given, "ids": ids}), want)


@pytest.mark.parametrize(
    ("heads", "shape", "later"),
    [
        ([2], (1, SIZE), (1, SIZE)),  # one head, without a batch
        ([2], (1, 1, SIZE), (3, 1, SIZE)),
        ([2], (1, 1, 1, SIZE), (3, 1, 12, SIZE)),
        ([2, 0], (1, 2, 1, SIZE), (3, 2, 12, SIZE)),
    ],
    ids=str,
)
def test_an_example_of_one_sequence_of_one_token(
    heads: list[int], shape: tuple[int, ...], later: tuple[int, ...]
) -> None:
    model, policy = Stack(), Steer(Input("given"), heads)
    fast = attnopt.optimize(model, policy, (x_of(1, 1),), {"given": torch.randn(shape)}, dynamic_shapes="auto")
    x, given = x_of(3, 12), torch.randn(later)
    whole = given[None] if given.dim() == 2 else given
    want = wanted(model, x, lambda o, v: steered(o, whole, tuple(heads)))
    oracle.assert_same(oracle.run(fast, (x,), {"given": given}), want)
    assert fast.report.fixed_axes == ("x[2] = 32",)


class Folded(nn.Module):
    """Sequences of several windows each."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Stack()

    def forward(self, x: Tensor) -> Tensor:
        (out,) = oracle.leaves(self.inner(x.flatten(0, 1)))
        return out.unflatten(0, x.shape[:2])


def test_an_example_of_one_sequence_of_several_windows(tmp_path: Path) -> None:
    model, policy = Folded(), Steer(Input("given"), [1, 2])
    fast = attnopt.optimize(
        model,
        policy,
        (x_of(2, 5)[None],),
        {"given": torch.randn(2, 2, SIZE)},
        dynamic_shapes={"x": dict.fromkeys(range(3), Dim.AUTO)},
    )
    for batch, windows, length in ((1, 2, 5), (3, 2, 7), (1, 5, 4)):
        x, given = x_of(batch * windows, length), torch.randn(batch * windows, 2, SIZE)
        want = wanted(model.inner, x, lambda o, v, given=given: steered(o, given, (1, 2)))
        feed = {"x": x.unflatten(0, (batch, windows)), "given": given}
        for got in (oracle.run(fast, (), feed), run_onnx(fast, tmp_path / "model.onnx", feed)):
            oracle.assert_same([got[0].flatten(0, 1)], want)


@pytest.mark.parametrize("between", [False, True])
def test_a_second_optimization_reads_the_same_input(between: bool) -> None:
    """``between``: after one that does not read it, whose signature no longer names it."""
    model, gains = Stack(), torch.rand(2, HEADS)
    fast = attnopt.optimize(model, ScaleHeads(Input("gains")), (x_of(2, 9),), {"gains": gains}, dynamic_shapes="auto")
    if between:
        fast = attnopt.optimize(fast, "fuse", (x_of(2, 9),), {"gains": gains}, dynamic_shapes="auto")
    again = attnopt.optimize(fast, ScaleHeads(Input("gains")), (x_of(2, 9),), {"gains": gains}, dynamic_shapes="auto")
    x, gains = x_of(3, 14), torch.rand(3, HEADS)
    squared = gains.square()[:, :, None, None]
    oracle.assert_same(oracle.run(again, (x,), {"gains": gains}), wanted(model, x, lambda o, v: o * squared))


class AnyKeyword(Stack):
    """Takes keywords that it does not name, of which it reads one."""

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return super().forward(x) + others["more"]


@pytest.mark.parametrize("takes_any", [False, True])
def test_further_optimizations_read_further_inputs(takes_any: bool) -> None:
    model, x, more = AnyKeyword() if takes_any else Stack(), x_of(2, 9), {"more": torch.ones(())} if takes_any else {}
    gains, delta = torch.rand(2, HEADS), torch.randn(2, 1, SIZE)
    fast = attnopt.optimize(model, "fuse", (x,), more, dynamic_shapes="auto")
    given: dict[str, Any] = {**more, "gains": gains}
    fast = attnopt.optimize(fast, {"first": ScaleHeads(Input("gains"))}, (x,), given, dynamic_shapes="auto")
    given = {**given, "delta": delta}
    fast = attnopt.optimize(fast, {"second": Steer(Input("delta"), [2])}, (x,), given, dynamic_shapes="auto")
    x, gains, delta = x_of(3, 14), torch.rand(3, HEADS), torch.randn(3, 1, SIZE)
    got = oracle.run(fast, (x,), {**more, "gains": gains, "delta": delta})
    plain = Stack()
    with by_hand(plain, lambda o, v: o * gains[:, :, None, None]):
        between = plain.first(x)
    with by_hand(plain, lambda o, v: steered(o, delta, (2,))):
        want = plain.second(between)
    oracle.assert_same(got, [want + 1.0 if takes_any else want])


def test_guidance_by_sample() -> None:
    model, gains = Stack(), torch.rand(1, HEADS)
    policy = ScaleHeads(Input("gains"))
    fast = attnopt.guidance(model, policy, (x_of(1, 9),), {"gains": gains}, scale=2.0, dynamic_shapes="auto")
    x, gains = x_of(3, 14), torch.rand(3, HEADS)
    (weak,), (strong,) = wanted(model, x, lambda o, v: o * gains[:, :, None, None]), oracle.run(model, (x,))
    oracle.assert_same(oracle.run(fast, (x,), {"gains": gains}), [strong + 2.0 * (strong - weak)])
    with pytest.raises(attnopt.CaptureError, match="gains has length 2 along axis 0, but another input has 3"):
        fast(x, gains=gains[:2])


@pytest.mark.parametrize("shapes", [None, {"x": {0: torch.export.Dim("b")}, "gains": {0: torch.export.Dim("b")}}])
def test_an_argument_of_the_model_itself(shapes: Any) -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stack = Stack()

        def forward(self, x: Tensor, gains: Tensor) -> Tensor:
            return self.stack(x * gains.mean(1)[:, None, None])

    model, x, gains = Gained(), x_of(2, 9), torch.rand(2, HEADS)
    fast = attnopt.optimize(model, ScaleHeads(Input("gains")), (x, gains), dynamic_shapes=shapes)
    x, gains = (x_of(2, 9), torch.rand(2, HEADS)) if shapes is None else (x_of(3, 9), torch.rand(3, HEADS))
    with by_hand(model.stack, lambda o, v: o * gains[:, :, None, None]):
        want = oracle.run(model, (x, gains))
    oracle.assert_same(oracle.run(fast, (x, gains)), want)
    with pytest.raises(attnopt.RewriteError, match="which may differ in other calls"):
        attnopt.optimize(
            model, ScaleHeads(Input("gains")), (x, gains), dynamic_shapes={"gains": {1: torch.export.Dim("h")}}
        )


def test_bad_inputs_are_named() -> None:
    model, x, given = Stack(), x_of(2, 9), torch.randn(2, HEADS, SIZE)
    with pytest.raises(attnopt.PolicyError, match="reads the input given, which is not among the example inputs"):
        attnopt.optimize(model, Steer(Input("given")), (x,))
    for wrong, told in (
        (given.long(), r"\[not-numbers\] expected floating-point numbers, found given of int64"),
        (given[:, :3], r"\[other-sizes\] expected given of 2 x 4 x 8, or of 4 x 8 for all sequences, found 2 x 3 x 8"),
        (given[..., :3], r"\[other-sizes\] .*found 2 x 4 x 3"),
        (given[:, :, None], r"\[other-sizes\] expected given of 2 x 4 x 9 x 8, .*found 2 x 4 x 1 x 8"),
        (3.0, r"\[unknown-input\]"),
    ):
        with pytest.raises(attnopt.RewriteError, match=told):
            attnopt.optimize(model, Steer(Input("given")), (x,), {"given": wrong}, strict=True)
    fast = attnopt.optimize(model, Steer(Input("given")), (x,), {"given": given}, dynamic_shapes="auto")
    with pytest.raises(attnopt.CaptureError, match="given"):
        fast(x)
    reading = r"[\s\S]*hint: first and 1 more read it as batch x 4 x 8, where the batch may be 1 or left out"
    for wrong, told in (
        (given[:, :3], "given has length 3 along axis 1, but was captured for 4 only"),
        (torch.randn(3, HEADS, SIZE), "given has length 3 along axis 0, but another input has 2 for it"),
        (given[0], "given has 2 axes, captured with 3"),
    ):
        with pytest.raises(attnopt.CaptureError, match=told + reading):
            fast(x, given=wrong)
    fast(x_of(5, 9), given=torch.randn(5, HEADS, SIZE))  # a check fixes no size
    with pytest.raises(attnopt.CaptureError, match="given has dtype"):
        fast(x, given=given.double())
    with pytest.raises(attnopt.RewriteError, match="given of 2 x 4 x 8"):
        attnopt.optimize(
            model, {"first": Steer(Input("given"), [0, 1]), "second": Steer(Input("given"))}, (x,),
            {"given": torch.randn(2, 2, SIZE)}, strict=True,
        )  # fmt: skip


def test_a_name_in_capitals_is_refused_with_one_that_works() -> None:
    model, x, given = Stack(), x_of(2, 9), torch.randn(2, HEADS, SIZE)
    with pytest.raises(
        attnopt.PolicyError, match=r"writes names of inputs in lower case\n  hint: call the input given"
    ):
        attnopt.optimize(model, Steer(Input("Given")), (x,), {"Given": given})


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (Steer(torch.ones(SIZE), [0, 1]), "steer: head 1 was pruned before, so that nothing of it is changed"),
        (
            ScaleHeads({1: 2.0, 3: 2.0}),
            "scale-heads: heads 1, 3 were pruned before, so that nothing of them is changed",
        ),
        (HeadPatch([3, 0]), "head-patch: head 3 was pruned before, so that nothing of it is changed"),
        (PruneHeads(heads=[1]), None),
        (ScaleHeads([1.0, 2.0, 2.0, 2.0]), None),
    ],
    ids=["steer", "scale", "patch", "prune again", "all heads"],
)
def test_edits_of_pruned_heads_are_told(edit: Any, told: str | None) -> None:
    fast = attnopt.optimize(Stack(), [PruneHeads(heads=[1, 3]), edit], (x_of(2, 9),))
    found = [note for site in fast.report.sites for note in site.notes if "was pruned" in note or "were pruned" in note]
    assert found == ([told] * 2 if told else [])


def test_a_strict_refusal_says_its_remedy_once() -> None:
    with pytest.raises(attnopt.RewriteError) as caught:
        attnopt.optimize(Stack(), ScaleHeads(Input("gains")), (x_of(2, 9),), {"gains": torch.ones(2, 3)}, strict=True)
    assert str(caught.value).count("give one gain for each head of the trained model") == 1


def test_policies_as_data() -> None:
    policy = attnopt.Policy.of([Steer(Input("a"), [1]), HeadPatch([0], Input("b")), MixMap(Input("c"), 0.5)])
    assert [i.name for i in policy.inputs] == ["a", "b", "c"]
    assert attnopt.Policy.from_json(policy.to_json()) == policy
    text = "steer(delta=Input('a'), heads=[1]), head-patch(heads=[0], values=Input('b')), mix-map(map=Input('c'), gate=0.5)"
    assert attnopt.Policy.of(text) == policy
