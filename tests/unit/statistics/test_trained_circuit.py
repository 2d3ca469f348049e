"""Heads of a model that was trained to continue repeated text: those that the statistics name are those that do it."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import Tensor
from trained_induction import HEADS, WIDTH, WORDS, foretold, repeated, trained

from attnopt import head_importance
from attnopt.statistics import needle_task

pytestmark = pytest.mark.slow
Heads = Collection[tuple[int, int]]  # layer and head


def without(heads: Heads) -> float:
    """What is foretold with the outputs of these heads set to zero before the output projection."""
    model, size = trained(), WIDTH // HEADS

    def silenced(layer: int, given: Tensor) -> tuple[Tensor]:
        changed = given.clone()
        for n, h in heads:
            if n == layer:
                changed[..., h * size : (h + 1) * size] = 0.0
        return (changed,)

    handles = [
        layer.o.register_forward_pre_hook(lambda _, a, n=n: silenced(n, a[0])) for n, layer in enumerate(model.layers)
    ]
    try:
        return foretold(model)
    finally:
        for handle in handles:
            handle.remove()


def named(scores: dict[str, tuple[float, ...]]) -> set[tuple[int, int]]:
    return {(n, h) for n, own in enumerate(scores.values()) for h, score in enumerate(own) if score > 0.5}


def test_induction_heads_of_a_trained_model() -> None:
    """All heads of the second layer: each does it alone, so that only together they are missed."""
    found = named(head_importance(trained(), [repeated(64, torch.Generator().manual_seed(2))[0]], "induction"))
    whole = foretold(trained())
    assert whole > 0.9
    assert found == {(1, h) for h in range(HEADS)}
    assert without(found) < 2 / WORDS
    alone = [without({(0, h)}) for h in range(HEADS)]
    previous = min(range(HEADS), key=alone.__getitem__)  # which tells each token what came before it
    assert without({(0, h) for h in range(HEADS) if h != previous}) > 0.95 * whole


def test_they_copy_needles() -> None:
    generator = torch.Generator().manual_seed(3)
    prompts, needles, answers = [], [], []
    for first in (1, 3, 5, 7) * 4:
        words = torch.randperm(WORDS, generator=generator)
        prompts.append([*words[:12].tolist(), int(words[first])])
        needles.append((first + 1, first + 4))
        answers.append(words[first + 1 : first + 4].tolist())
    found = named(head_importance(trained(), *needle_task(prompts, needles, answers)))
    assert found == {(1, h) for h in range(HEADS)}
