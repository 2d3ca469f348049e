"""One number of what a model gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from attnopt.base.compile_lock import as_called
from attnopt.errors import CalibrationError, PolicyError

Metric = Callable[[Any], "Tensor | float"]  # the model's output -> a scalar


def require_callable(owner: str, name: str, given: object) -> None:
    """Raises PolicyError."""
    if not callable(given):
        raise PolicyError(f"{owner}: {name} is a {type(given).__name__}, expected a function")


def scalar(found: object, name: str, where: str) -> float:
    """The finite number that ``name`` returned.  Raises CalibrationError."""
    is_one = found.numel() == 1 and not found.is_complex() if isinstance(found, Tensor) else isinstance(found, Real)
    if not is_one or isinstance(found, bool):
        told = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__}"
        raise CalibrationError(
            f"the {name} returns {told} {where}, expected one real number", hint="take its mean, or one entry of it"
        )
    number = float(found)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise CalibrationError(
            f"the {name} is {number} {where}",
            hint=f"choose inputs and a {name} that are finite, such as a difference of logits",
        )
    return number


def measured(metric: Metric, output: Any, where: str) -> float:
    """``metric(output)`` as a number; ``where`` says of which run.  Raises CalibrationError."""
    with as_called():
        found = metric(output)
    return scalar(found, "metric", where)
