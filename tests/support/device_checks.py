"""What several ranks check on their own kind of device, so with its backend: on CPUs gloo, on GPUs NCCL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from split_checks import same
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import attnopt
from attnopt.distributed import context_parallel, optimize, share_calibration, tensor_parallel
from attnopt.distributed.ranks import Ranks
from attnopt.errors import DistributedError
from attnopt.fit.least_squares import Moments
from attnopt.passes import LocalWindow, PruneHeads

HEADS, DIM = 4, 16
WIDTH = HEADS * DIM


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (p(y).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(o.transpose(1, 2).flatten(2))


def made(mesh: DeviceMesh) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3))).to(mesh.device_type).eval()


def tokens(mesh: DeviceMesh, length: int = 37, seed: int = 0) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed)).to(mesh.device_type)


def batches(mesh: DeviceMesh) -> list[Tensor]:
    return [tokens(mesh, 24, seed) for seed in range(1, 9)]


def own(mesh: DeviceMesh) -> Any:
    every = batches(mesh)
    each = len(every) // mesh.size()
    return share_calibration(every[each * mesh.get_local_rank() :][:each], mesh)


def tensors_arrive_on_the_own_device(mesh: DeviceMesh) -> None:
    ranks = Ranks.of(mesh, None)
    x = torch.full((3,), float(ranks.rank), device=mesh.device_type)
    for rank, told in enumerate(ranks.everyone(Moments(x, x, 0.0, 1))):
        assert isinstance(told, Moments)
        assert told.zz.device == x.device
        assert told.zz.tolist() == 3 * [float(rank)]


def devices_that_the_group_does_not_send_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(DistributedError, match="sends no tensors on the device meta"):
        Ranks.of(mesh, None).summed(torch.ones(2, device="meta"), "nothing")


def sequences_are_shared(mesh: DeviceMesh) -> None:
    for policy, method in (("fuse", "keys"), ("fuse", "heads"), (LocalWindow(left=5, right=0, sinks=2), "auto")):
        fast = attnopt.optimize(made(mesh), policy, (tokens(mesh),), dynamic_shapes="auto", backend="blocked")
        parallel = context_parallel(fast, mesh, method=method)
        x = tokens(mesh, 53)
        got, want = parallel(x), fast(x)
        same(got, parallel.own(want), 1e-5)
        (wanted,) = torch.autograd.grad(want.square().sum(), [fast.get_parameter("module.0.q.weight")])
        got.square().sum().backward()
        parallel.reduce_gradients()
        same(fast.get_parameter("module.0.q.weight").grad, wanted, 1e-4)  # type: ignore[arg-type]


def weights_are_split(mesh: DeviceMesh) -> None:
    up, down = ColwiseParallel(), RowwiseParallel()
    fast = attnopt.optimize(made(mesh), LocalWindow(left=5, right=0), (tokens(mesh),), dynamic_shapes="auto")
    split = tensor_parallel(fast, mesh, {f"*.{name}": up for name in "qkv"} | {"*.out": down})
    with torch.no_grad():
        same(split(tokens(mesh)), fast(tokens(mesh)))


def calibration_is_shared(mesh: DeviceMesh) -> None:
    given, policy = (tokens(mesh, 24),), PruneHeads(0.25)
    alone = attnopt.optimize(made(mesh), policy, given, calibration=batches(mesh))
    shared = attnopt.optimize(made(mesh), policy, given, calibration=own(mesh))
    user = made(mesh)
    for block in user.children():
        fully_shard(block, mesh=mesh)
    split = optimize(fully_shard(user, mesh=mesh), policy, given, calibration=own(mesh))
    with torch.no_grad():
        for fast in (shared, split):
            same(fast(*given), alone(*given))


CHECKS: dict[str, Callable[[DeviceMesh], None]] = {
    run.__name__: run
    for run in (
        tensors_arrive_on_the_own_device,
        devices_that_the_group_does_not_send_are_refused,
        sequences_are_shared,
        weights_are_split,
        calibration_is_shared,
    )
}
