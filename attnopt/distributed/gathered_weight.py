"""A weight that is put together where a graph reads it, and let go afterwards, as ``fully_shard`` does with those of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def gathered_weight(x: Tensor) -> Tensor:
    """The whole of a DTensor on every process.  Its gradient is the mean of those of all processes, divided as ``x`` is."""
    if not isinstance(x, DTensor):  # it is gathered where an operator reads it, as while the result is optimized again
        return x
    made: Tensor = _Gathered.apply(x)  # type: ignore[no-untyped-call]
    return made


def whole_of(x: DTensor) -> Tensor:
    """The whole of a DTensor on every process, without a gradient."""
    with torch.no_grad():
        whole: Tensor = x.full_tensor()
    return whole


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        return whole_of(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> DTensor:
        mesh = ctx.mesh
        parts = DTensor.from_local(gradients[0] / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements)
