"""Some cases in a row, in one process."""

from __future__ import annotations

import gc

import torch

from fuzzing.grammar import draw
from fuzzing.laws import Outcome, checked


def chunk(seed: int, first: int, last: int) -> list[Outcome]:
    """The outcomes of the cases with these numbers."""
    torch.set_num_threads(1)
    gc.disable()  # a fifth of the time: tracing makes many objects that live through a case
    try:
        return [checked(draw(seed, n)) for n in range(first, last)]
    finally:
        gc.enable()
        gc.collect()
