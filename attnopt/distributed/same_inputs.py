"""The inputs of a call, which have to be the same on every rank: other ones would give wrong numbers without a word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import tolerance
from attnopt.errors import DistributedError

SAMPLED = 256  # numbers of each tensor that are compared
Samples = list[tuple[str, Tensor | None]]


def sampled(inputs: CallInputs) -> Samples:
    """What each input is, and some of its numbers."""
    return [_told(x) for x in pytree.tree_leaves((inputs.args, inputs.kwargs))]


def require_same_inputs(told: Sequence[Samples]) -> None:
    """``told``: by rank.  Numbers that are no integers may differ by rounding, as where each rank computed them.

    Raises DistributedError on every rank."""
    first = told[0]
    for rank, own in enumerate(told):
        if len(own) != len(first):
            raise _error(f"rank {rank} passes {len(own)} inputs, and rank 0 {len(first)}")
        for place, ((what, numbers), (wanted, others)) in enumerate(zip(own, first, strict=True)):
            if what != wanted:
                raise _error(f"rank {rank} passes {what} as input {place}, and rank 0 {wanted}")
            if numbers is not None and others is not None and not _is_close(numbers, others):
                raise _error(f"rank {rank} passes other numbers than rank 0 as input {place}, {what}")


def _told(x: object) -> tuple[str, Tensor | None]:
    if not isinstance(x, Tensor):
        return (repr(x) if isinstance(x, (int, float, str, type(None))) else type(x).__name__), None
    flat = x.detach().reshape(-1)
    places = torch.linspace(0, max(0, len(flat) - 1), min(SAMPLED, len(flat)), dtype=torch.float64).long()
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}", flat[places.to(flat.device)].cpu()


def _is_close(got: Tensor, want: Tensor) -> bool:
    if torch.equal(got, want):
        return True
    if not (want.is_floating_point() or want.is_complex()):
        return False
    wide = torch.complex128 if want.is_complex() else torch.float64
    largest = float(want.to(wide).abs().nan_to_num(0.0, 0.0).max())
    return torch.allclose(got.to(wide), want.to(wide), rtol=0.0, atol=tolerance([want]) * largest, equal_nan=True)


def _error(why: str) -> DistributedError:
    return DistributedError(why, hint="pass the same, whole inputs on every rank; each computes its own tokens of them")
