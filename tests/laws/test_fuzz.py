"""Random models with every law on each, cases that once failed, and proofs that the harness sees what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from fuzzing.chunks import chunk
from fuzzing.figures import LEAST, Figures
from fuzzing.grammar import REWRITES, Block, Case, draw, from_json, to_json
from fuzzing.laws import checked
from fuzzing.shrinking import shrunk
from fuzzing.stored import stored
from models import Spelling
from mutations import misplaced

from attnopt.compiler import compile as optimizing
from attnopt.compiler.check import Checker

CASES, CHUNK, SEED = 150, 15, 20261122
# Why a real attention may be missed.  The share of all of them is what ``make fuzz`` holds to ``LEAST``.
HONEST = {
    "CaptureError",  # a branch on values
    "moderate-mask",  # float16's least number written over scores that may all be hidden
    "one-key",  # a softmax that has nothing to choose from
}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases(first: int) -> None:
    for number, outcome in enumerate(chunk(SEED, first, first + CHUNK), first):
        assert not outcome.failure, f"case {number}: {outcome.why}\n{to_json(outcome.case)}"
        missed = [(code, s) for code, s in outcome.missed if code not in HONEST]
        assert not missed, f"case {number}: {missed}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for _, c in stored()], ids=[name for name, _ in stored()])
def test_cases_that_once_failed(case: Case) -> None:
    outcome = checked(case)
    assert not outcome.failure, outcome.why
    assert outcome.found == outcome.attentions, outcome.missed


def test_cases_are_reproducible_and_travel_as_json() -> None:
    cases = [draw(7, n) for n in range(200)]
    assert cases == [draw(7, n) for n in range(200)]
    assert [from_json(to_json(c)) for c in cases] == cases
    assert all(c == c.repaired() for c in cases)
    assert {b.rewrite for c in cases for b in c.blocks} == set(REWRITES)


# ---------------------------------------------------------------- the harness itself
def broken(*_: Any, **__: Any) -> Any:
    raise KeyError("axis")


@pytest.mark.parametrize("rewrite", ["none", "window", "prune", "group", "steer", "add"])
def test_wrong_numbers_are_seen(rewrite: str) -> None:
    """A scale that is a little off, in what is lowered alone."""
    real = optimizing.rewritten

    def off(gm: Any, plans: Any, plain: bool = False, **more: Any) -> Any:
        return real(gm, [replace(p, spec=replace(p.spec, scale=p.spec.scale * 1.02)) for p in plans], plain, **more)

    case = Case((Block(Spelling(), rewrite=rewrite, number=5),))
    assert not checked(case).failure
    with (
        mock.patch.object(optimizing, "rewritten", off),
        mock.patch.object(Checker, "check", return_value=(0.0, ())),
    ):
        assert checked(case).failure == "wrong"


def test_changed_weights_of_the_user_are_seen() -> None:
    real = optimizing.find

    def meddling(program: Any) -> Any:
        with torch.no_grad():
            next(iter(program.module.parameters())).add_(1e-7)
        return real(program)

    with mock.patch.object(optimizing, "find", meddling):
        outcome = checked(Case())
    assert outcome.failure == "wrong"
    assert "of the user's model was changed" in outcome.why


def test_crashes_are_seen_and_shrunk() -> None:
    case = Case((Block(Spelling(rope="half", norm="l2"), rewrite="scale"), Block(Spelling(bias=False))), branch="shape")
    with mock.patch.object(optimizing, "rewritten", broken):
        assert checked(case).failure == "crashed"
        small = shrunk(case, lambda c: checked(c).failure == "crashed")
    assert small == Case()


def test_figures_judge() -> None:
    right, capture = checked(Case()), checked(Case(branch="data", seed=3))
    assert (right.found, right.attentions, right.failure) == (1, 1, "")
    assert Figures.of([right]).passed
    assert capture.missed == [("CaptureError", Spelling())], capture.why
    both = Figures.of([right, capture])
    assert both.share == 0.5 < LEAST
    assert not both.passed
    assert "1 of 2 attentions found: 50.00%" in str(both)
    wrong = replace(right, failure="wrong")
    assert not Figures.of([right, wrong]).passed


def test_every_planted_fault_has_its_place() -> None:
    assert not misplaced()
