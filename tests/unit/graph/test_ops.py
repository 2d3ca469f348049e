"""The table of operators: its facts hold, and each table of rules has every layout operator, or a reason for its absence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.graph import entry_rules
from attnopt.graph.axes import FOLLOWED, NOT_FOLLOWED, NOT_UNFOLLOWED, UNFOLLOWED
from attnopt.graph.ops import ALIASES, LAYOUT, OPS, ZERO, Kind, Op, aliases, aten, is_pointwise, named, of, row
from attnopt.graph.products import PRODUCTS
from attnopt.slicing.pull_compute import COMPUTE
from attnopt.slicing.pull_layout import LAYOUT as PULLED
from attnopt.slicing.pull_layout import NOT_PULLED
from attnopt.slicing.push import NOT_PUSHED, PUSHED

LAYOUTS = of(*LAYOUT)
COPIED = dict.fromkeys(of(Kind.COPY, Kind.CAST))  # which are computed element by element
RULES: dict[str, tuple[Mapping[Any, Any], Mapping[str, str]]] = {
    "follow": (FOLLOWED, NOT_FOLLOWED),
    "unfollow": (UNFOLLOWED, NOT_UNFOLLOWED),
    "pull": (PULLED, NOT_PULLED),
    "push": (PUSHED | dict.fromkeys(ZERO), NOT_PUSHED),
    "entries": (entry_rules.MOVES | entry_rules.MADE | COPIED, entry_rules.NO_ENTRIES),
}


@pytest.mark.parametrize("name", RULES)
def test_every_layout_operator_has_a_rule_or_a_reason(name: str) -> None:
    rules, absent = RULES[name]
    without = named(" ".join(absent))
    assert {str(t) for t in LAYOUTS - rules.keys()} == {str(t) for t in without}


def test_every_product_is_read() -> None:
    assert of(Kind.PRODUCT) <= PRODUCTS.keys()


def test_every_convolution_and_reduction_is_pulled() -> None:
    assert of(Kind.CONVOLUTION, Kind.REDUCE, Kind.EMBEDDING, Kind.SOFTMAX, Kind.LOG_SOFTMAX) <= COMPUTE.keys()


def test_each_operator_has_one_row() -> None:
    names = [op.name for op in OPS]
    assert len(set(names)) == len(names)
    for op in OPS:
        assert named(op.name), op.name
        assert {row(target) for target in named(op.name)} == {op}


def test_overloads_that_do_something_else_have_no_row() -> None:
    assert row(aten.view.dtype) is None
    assert row(aten.where.default) is None
    assert not {aten.add.t, aten.add_.Tensor, aten.add.out, aten.neg.int} & named("add neg")


def test_operators_of_others_have_no_row() -> None:
    """A namesake of an operator may mean anything."""
    with torch.library._scoped_library("acme", "FRAGMENT") as library:
        library.define("linear(Tensor x, Tensor w) -> Tensor")
        assert row(torch.ops.acme.linear.default) is None


def called(op: Op, x: Tensor) -> Tensor:
    more: dict[str, tuple[Any, ...]] = {
        "dropout": (0.5, False),
        "feature_dropout": (0.5, False),
        "to": (torch.float64,),
    }
    target = aten.to.dtype if op.name == "to" else getattr(aten, op.name).default
    made: Tensor = target(x, *more.get(op.name, ()))
    return made


@pytest.mark.parametrize("op", [op for op in OPS if op.zero], ids=lambda op: op.name)
def test_zeros_stay_zeros(op: Op) -> None:
    zeros = torch.zeros(3, dtype=torch.complex64 if "conj" in op.name else torch.float32)
    assert not called(op, zeros).any()


@pytest.mark.parametrize("op", [op for op in OPS if op.linear], ids=lambda op: op.name)
def test_factors_move_past_linear_operators(op: Op) -> None:
    x = torch.tensor([-1.5, 0.25, 3.0])
    assert torch.equal(called(op, -4 * x), -4 * called(op, x))


def test_pointwise_operators() -> None:
    """Those of torch's tag, those that lack it, and none that draws or mixes elements."""
    every = (
        aten.add.Tensor,
        aten.erf.default,
        aten.hardswish.default,
        aten.__and__.Tensor,
        aten.clone.default,
        aten.to.dtype,
    )
    assert all(map(is_pointwise, every))
    assert not any(
        map(is_pointwise, (aten.rrelu.default, aten.cumsum.default, aten.softmax.int, aten.prelu.default, "x"))
    )


@pytest.mark.parametrize("name", ALIASES)
def test_other_names_take_the_same_arguments(name: str) -> None:
    found = {a: b for a, b in aliases().items() if a.overloadpacket is getattr(aten, name)}
    assert found
    for alias, target in found.items():
        types, others = ([(str(a.type), a.kwarg_only) for a in op._schema.arguments] for op in (alias, target))
        assert types == others


@pytest.mark.parametrize("name", [n for n, meant in ALIASES.items() if is_pointwise(getattr(aten, meant).default)])
def test_other_names_compute_the_same(name: str) -> None:
    x = torch.rand(5) + 0.1
    alias, target = getattr(aten, name).default, getattr(aten, ALIASES[name]).default
    given = (x, x.flip(0)) if "other" in str(target._schema) else (x, 0.3) if "clamp" in str(target) else (x,)
    assert torch.equal(alias(*given), target(*given))
