"""The comparison that everything rests on FAILS on wrong numbers; so does the tests' own."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from models import Attention, Spelling

import attnopt
from attnopt.base.closeness import TOLERANCE, difference, tensors, tolerance

X = torch.linspace(-3, 3, 24).reshape(4, 6)


@pytest.mark.parametrize("measure", [difference, oracle.distance], ids=["attnopt", "oracle"])
class TestDistances:
    def test_equal_is_zero(self, measure):  # type: ignore[no-untyped-def]
        assert measure([X, X.bool()], [X.clone(), X.bool()]) == 0.0

    @pytest.mark.parametrize("error", [1e-6, 1e-3, 1.0, 100.0])
    def test_one_wrong_number_is_seen_at_its_size(self, measure, error):  # type: ignore[no-untyped-def]
        wrong = X.double().clone()
        wrong[2, 3] += error
        assert measure([wrong], [X.double()]) == pytest.approx(error / 3, rel=1e-6)

    def test_small_tensors_are_measured_absolutely(self, measure):  # type: ignore[no-untyped-def]
        assert measure([X.double() * 1e-3 + 1e-3], [X.double() * 1e-3]) == pytest.approx(1e-3)

    def test_the_worst_of_several_counts(self, measure):  # type: ignore[no-untyped-def]
        assert measure([X, X + 1, X], [X, X, X]) == pytest.approx(1 / 3)

    @pytest.mark.parametrize(
        "got",
        [
            [X[:2]], [X.reshape(6, 4)], [X.unsqueeze(0)], [X, X], [], [X.masked_fill(X > 2, math.nan)],
            [X.masked_fill(X > 2, math.inf)], [torch.full_like(X, math.nan)],
        ],
        ids=["fewer rows", "reshaped", "more axes", "more tensors", "none", "NaN", "infinity", "all NaN"],
    )  # fmt: skip
    def test_what_cannot_be_compared_is_infinitely_wrong(self, measure, got):  # type: ignore[no-untyped-def]
        assert measure(got, [X]) == math.inf

    def test_nan_and_infinities_have_their_places(self, measure):  # type: ignore[no-untyped-def]
        holes = X.masked_fill(X > 2, math.nan).masked_fill(X < -2, -math.inf)
        assert measure([holes.clone()], [holes]) == 0.0
        moved = holes.flip(0)
        assert measure([moved], [holes]) == math.inf
        assert measure([X.masked_fill(X > 2, math.nan).masked_fill(X < -2, math.inf)], [holes]) == math.inf
        wrong = holes.clone()
        wrong[2, 0] += 1
        assert measure([wrong], [holes]) > 0.1


def test_whole_numbers_have_to_be_equal() -> None:
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == math.inf
    assert difference([torch.tensor([True])], [torch.tensor([False])]) == math.inf


def test_complex_numbers_are_compared() -> None:
    z = torch.polar(torch.ones(4), torch.arange(4.0))
    assert difference([z], [z.clone()]) == 0.0
    assert difference([z.conj()], [z]) > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tolerance_of_each_dtype_is_above_rounding_and_below_mistakes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 64, dtype=torch.float64), torch.randn(64, 64, dtype=torch.float64)
    rounded = (a.to(dtype).double() @ b.to(dtype).double()).to(dtype)
    assert difference([rounded], [(a @ b).to(dtype)]) <= TOLERANCE[dtype]
    swapped = a.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]  # two features of a head in the wrong order
    assert difference([(swapped @ b).to(dtype)], [(a @ b).to(dtype)]) > TOLERANCE[dtype]


def test_tolerance_is_of_the_least_precise() -> None:
    assert tolerance([X, X.bfloat16()]) == TOLERANCE[torch.bfloat16]
    assert tolerance([torch.complex(X, X)]) == TOLERANCE[torch.float32]
    assert tolerance([torch.tensor([1])]) == 0.0
    assert tolerance([]) == 0.0


def test_tensors_finds_each() -> None:
    assert len(tensors({"a": X, "b": [X, (X, None, 3)]})) == 3


@pytest.mark.parametrize("factor", [1.01, 0.0, -1.0])
def test_a_backend_that_computes_wrong_numbers_is_caught(factor: float) -> None:
    from attnopt.backends import Reference

    class Wrong(Reference):
        name = "wrong"

        def lower(self, spec):  # type: ignore[no-untyped-def]
            attend = super().lower(spec)
            return lambda q, k, v, **operands: attend(q, k, v, **operands) * factor

    model, x = Attention(Spelling()), torch.randn(2, 7, 12)
    for policy in ("fuse", "local-window(left=2)", "prune-heads(heads=[1])"):
        with pytest.raises(attnopt.VerificationError):
            attnopt.optimize(model, policy, (x,), backend=Wrong())


def test_assert_same_fails() -> None:
    with pytest.raises(AssertionError, match="relative difference"):
        oracle.assert_same([X * 1.01], [X])
    with pytest.raises(AssertionError, match="nothing to compare"):
        oracle.assert_same([], [])
    with pytest.raises(AssertionError, match="changes nothing"):
        oracle.assert_differs([X], [X])


def test_the_oracle_edits_what_it_says() -> None:
    """On scores that are written out: the edit is exactly a mask before the softmax and a gain after it."""
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    visible = torch.ones(3, 5, 5, dtype=torch.bool).tril()
    gains = (1.0, 0.0, -2.0)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~visible, -math.inf)
    want = scores.exp() / scores.exp().sum(-1, keepdim=True) @ v * torch.tensor(gains).view(1, 3, 1, 1)
    forms = {
        "softmax": lambda: (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v,
        "functional": lambda: torch.nn.functional.softmax(q @ k.transpose(-1, -2) / 2, dim=3) @ v,
        "transposed": lambda: torch.softmax(k @ q.transpose(-1, -2) / 2, -2).transpose(-1, -2) @ v,
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "merged": lambda: ((q.flatten(0, 1) @ k.flatten(0, 1).mT / 2).softmax(-1) @ v.flatten(0, 1)).view(v.shape),
    }
    for name, form in forms.items():
        with oracle.edited({0: oracle.Edit(visible, gains)}, heads=3) as counter:
            got = form()
        assert counter.seen == 1, name
        oracle.assert_same([got], [want], name)
