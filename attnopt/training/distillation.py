"""Distillation: a student learns the outputs of its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.base.closeness import tensors
from attnopt.base.options import whole
from attnopt.capture.calibration import Batch, Calibration
from attnopt.errors import PolicyError
from attnopt.fit.descent import descend

RATE = 3e-3

Loss = Callable[[Any, Any], Tensor]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch] | Calibration,
    steps: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> list[float]:
    """Train ``student`` in place on the outputs of ``teacher``; the loss before each step.

    ``batches``: as calibration data, in turn.  ``optimizer``: of parameters of the student; None: AdamW, at a rate of 0.003, on
    those that the teacher does not share, which for a rewritten model are the new ones.  ``loss(got, wanted)``: of the outputs of
    both; None: the squared error relative to the square of what is wanted.  The modes of both modules stay as they are.  The same
    ``seed`` gives the same history.

    Raises PolicyError if the optimizer would change the teacher too, or nothing of the student.
    """
    data, measure = Calibration.of(batches).batches, loss or relative_error
    whole("distill", "steps", steps)
    chosen = _on_new(student, teacher) if optimizer is None else optimizer
    _check(chosen, student, teacher)

    def of_step(step: int) -> Tensor:
        args, kwargs = data[step % len(data)]
        with torch.no_grad():
            wanted = teacher(*args, **kwargs)
        return measure(student(*args, **kwargs), wanted)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return descend(of_step, chosen, steps, "distilling")


def relative_error(got: object, wanted: object) -> Tensor:
    """The mean over the floating-point tensors of the outputs of ``|got - wanted|^2 / |wanted|^2``."""
    pairs = zip(tensors(got), tensors(wanted), strict=True)
    errors = [
        (a.float() - b.float()).square().sum() / b.float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        for a, b in pairs
        if b.is_floating_point()
    ]
    if not errors:
        raise PolicyError("distill: the model returns no floating-point tensor", hint="pass loss=")
    return torch.stack(errors).mean()


def _on_new(student: nn.Module, teacher: nn.Module) -> torch.optim.Optimizer:
    shared = _memory(teacher.parameters())
    new = [p for p in student.parameters() if p.requires_grad and not _memory([p]) & shared]
    if not new:
        raise PolicyError(
            "distill: the student shares all of its parameters with the teacher",
            hint="pass teacher=copy.deepcopy(model) and an optimizer of what is to be trained",
        )
    return torch.optim.AdamW(new, lr=RATE, weight_decay=0.0)


def _check(optimizer: torch.optim.Optimizer, student: nn.Module, teacher: nn.Module) -> None:
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    memory = _memory(trained)
    if not memory & _memory(student.parameters()):
        raise PolicyError(
            "distill: the optimizer has no parameter of the student", hint="make it of student.parameters()"
        )
    both = [name for name, p in teacher.named_parameters() if _memory([p]) & memory]
    if both:
        raise PolicyError(
            f"distill: the optimizer would change the teacher too, which shares {both[0]} and {len(both) - 1} more",
            hint="pass teacher=copy.deepcopy(model), or an optimizer of the new parameters alone",
        )


def _memory(parameters: Iterable[Tensor]) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in parameters if p.numel()}
