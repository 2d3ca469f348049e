"""Random tokens beside the texts that are held back, on which a search judges encoders of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stacks import batches, stack
from token_readers import BEGIN, Reader, texts
from torch import nn

import attnopt
from attnopt import Budget, Choice
from attnopt.base.call_inputs import CallInputs
from attnopt.capture.calibration import Calibration
from attnopt.passes import LocalWindow, PruneHeads
from attnopt.policy_search.judge import Judge
from attnopt.policy_search.problem import Problem, Task, problem

pytestmark = pytest.mark.usefixtures("one_capture")


def asked(model: nn.Module, data: list[Any], policy: Any) -> Problem:
    given = data[0] if isinstance(data[0], tuple) else (data[0],)
    return problem(Task(model.eval(), policy, CallInputs(given, {}), Calibration.of(data), Budget(flops=0.9)))


def test_each_text_that_is_held_back_has_random_tokens_beside_it() -> None:
    data = texts(count=4)
    data[3] = data[3][0], data[3][1] + 7  # places that only the text has that is held back
    judged = asked(Reader(), data, PruneHeads(0.5)).judged
    assert judged.has_random_tokens
    (ids, places), (drawn, same) = (piece.args for piece in judged.pieces)
    assert torch.equal(ids, data[3][0])
    assert torch.equal(same, places)
    assert bool((drawn[:, 0] == BEGIN).all())
    assert int(drawn[:, 1:].max()) > 200, "words that no text has"


def test_without_a_fit_all_texts_have() -> None:
    data = texts(count=2)
    judged = asked(Reader(), data, LocalWindow(2)).judged
    assert [torch.equal(p.args[0], own[0]) for p, own in zip(judged.pieces[::2], data, strict=True)] == [True, True]
    assert len(judged.pieces) == 4


def test_decoders_and_models_of_features_are_judged_on_the_data_alone() -> None:
    judged = asked(Reader(causal=True), texts(count=2), LocalWindow(2)).judged
    assert (len(judged.pieces), judged.has_random_tokens) == (2, False)
    judged = asked(stack(), batches(3, 4), LocalWindow(2)).judged
    assert (len(judged.pieces), judged.has_random_tokens) == (3, False)


def test_the_divergence_is_that_of_both() -> None:
    model, data = Reader().eval(), texts(count=2)
    policy = {"*": Choice(None, LocalWindow(1))}
    found = attnopt.search(model, policy, data[0], calibration=data, budget=Budget(flops=0.95))
    assert found.report.measure == "cosine distance of the outputs, on texts and on random tokens"
    fast = found.optimize()
    pieces = [piece.args for piece in asked(model, data, policy).judged.pieces]
    with torch.no_grad():
        pairs = [(fast(*piece), model(*piece)) for piece in pieces]
    got, want = (torch.cat([x.flatten(0, 1) for x in side]).double() for side in zip(*pairs, strict=True))
    assert found.divergence == pytest.approx(float((1 - torch.cosine_similarity(got, want, dim=-1)).mean()), rel=1e-4)
    assert found.divergence > 1e-3


def test_a_fit_is_judged_on_texts_alone() -> None:
    """It has seen random tokens, where it counts as no better than what it is fitted to."""
    made = asked(Reader(), texts(count=4), PruneHeads(0.5, compensate="none"))
    picks = (1,) * made.menu.places
    Judge(made.measure, made.pieces, made.state.values).value(picks)
    judge = made.refit_judge(lambda: False)
    assert judge is not None
    judge.value((*picks, 0))
    of_text, of_random = judge.known[*picks, 0].values()
    assert of_text == made.measure(picks, [0], 0)[0] != made.measure(picks, [0])[0]
    assert of_random == made.measure(picks, [1])[0] != made.measure(picks, [1], 0)[0]
