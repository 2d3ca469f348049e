"""Steps of gradient descent, one plain loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.base.progress import working


def descend(
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    what: str,
    is_done: Callable[[int], bool] = lambda step: False,
) -> list[float]:
    """The loss of each step, before it is taken.  ``loss(step)``: a number to make smaller; ``is_done(step)``: after this step,
    whether to stop.  ``what``: the line of the progress bar."""
    history: list[float] = []
    with torch.enable_grad(), working(what, steps) as advance:
        for step in range(steps):
            optimizer.zero_grad()
            found = loss(step)
            found.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            history.append(float(found.detach()))
            advance()
            if is_done(step):
                break
    return history
