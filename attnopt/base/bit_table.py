"""Tables as plain operators: built from numbers inside a traced graph, without a constant tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

WORD = 32  # columns per number of a row


def looked_up(rows: Sequence[int], columns: int, row: Tensor, col: Tensor) -> Tensor:
    """Bit ``col`` of ``rows[row]``, for indices within the table that broadcast against each other."""
    words = -(-columns // WORD)
    numbers = [bits >> WORD * word & (1 << WORD) - 1 for bits in rows for word in range(words)]
    packed = stretched(((number, 1) for number in numbers), row.device).reshape(len(rows), words, 1)
    place = 2 ** torch.arange(WORD, device=row.device)
    return (packed // place % 2 == 1).reshape(len(rows), words * WORD)[row, col]


def stretched(runs: Iterable[tuple[float, int]], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Each value of the (value, count) pairs, repeated count times."""
    joined: list[tuple[float, int]] = []
    for value, count in runs:
        if joined and joined[-1][0] == value:
            joined[-1] = (value, joined[-1][1] + count)
        else:
            joined.append((value, count))
    return torch.cat([torch.full((count,), value, dtype=dtype, device=device) for value, count in joined])


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` as an int64 tensor built from ranges: ``torch.tensor`` would become a constant of the traced graph."""
    made = [torch.arange(run.start, run.stop, run.step, device=device) for run in runs_of(values)]
    return torch.cat(made) if made else torch.arange(0, device=device)


def runs_of(values: Sequence[int]) -> Iterator[range]:
    """``values`` as ascending ranges of one step each, none of which holds numbers below 0 beside others."""
    start = 0
    while start < len(values):
        end = start + 1
        step = values[end] - values[start] if end < len(values) else 0
        while (
            step > 0
            and end < len(values)
            and values[end] - values[end - 1] == step
            and (values[end] < 0) == (values[start] < 0)
        ):
            end += 1
        if end - start == 2 and step > 1:  # two numbers are no run
            end -= 1
        yield range(values[start], values[end - 1] + 1, step if end - start > 1 else 1)
        start = end
