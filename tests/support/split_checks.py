"""What several ranks check of models that are split before they are optimized; ``parallel_checks`` lists them."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_models import DIM, VOCABULARY, WIDTH, Model, Style, inputs, model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import attnopt
from attnopt.distributed import context_parallel, gathered, optimize, share_calibration, split_model
from attnopt.distributed.split_model import _Shared
from attnopt.errors import CalibrationError, CaptureError, DistributedError
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads


def batches(count: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (6, 12), generator=random) for _ in range(count)]


def shared(mesh: DeviceMesh, every: Sequence[Tensor]) -> attnopt.Calibration:
    """As many for each rank."""
    each = len(every) // mesh.size()
    return share_calibration(every[each * mesh.get_rank() :][:each], mesh)


def sharded(user: Model, mesh: DeviceMesh, **options: Any) -> Model:
    for block in (*user.attentions, *user.mlps):
        fully_shard(block, mesh=mesh, **options)
    fully_shard(user, mesh=mesh, **options)
    return user


def same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    apart = float((got - want).detach().abs().max() / want.detach().abs().max())
    assert apart <= tolerance, apart


@dataclass
class Gathered:
    """Bytes of whole weights that live at the same time, and of all that were gathered."""

    now: int = 0
    most: int = 0
    names: set[str] = field(default_factory=set)

    def count(self, x: Tensor, name: str) -> None:
        self.now += x.nbytes
        self.most = max(self.most, self.now)
        self.names.add(name)
        weakref.finalize(x, self._gone, x.nbytes)

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def counted() -> Iterator[Gathered]:
    found, plain = Gathered(), _Shared.gather

    def gather(self: _Shared) -> Tensor:
        made = plain(self)
        found.count(made, self.name)
        return made

    _Shared.gather = gather  # type: ignore[method-assign]
    try:
        yield found
    finally:
        _Shared.gather = plain  # type: ignore[method-assign]


def split_models_are_calibrated_as_whole_ones(mesh: DeviceMesh) -> None:
    _most_gathered(mesh, layers=2)


def what_a_rank_gathers_does_not_grow_with_layers(mesh: DeviceMesh) -> None:
    assert _most_gathered(mesh, layers=5) == _most_gathered(mesh, layers=2)


def _most_gathered(mesh: DeviceMesh, layers: int) -> int:
    """The most bytes of whole weights that a rank holds at one time."""
    style, policy = Style(rope=True, layers=layers), PruneHeads(0.5)
    given, every = (batches()[0],), batches()
    alone = attnopt.optimize(model(style), policy, given, calibration=every, dynamic_shapes="auto")
    user = sharded(model(style), mesh)
    with counted() as found:
        fast = optimize(user, policy, given, calibration=shared(mesh, every), dynamic_shapes="auto")
    assert [s.spec.heads for s in fast.sites] == [s.spec.heads for s in alone.sites]
    assert abs(fast.report.error / alone.report.error - 1) < 1e-4
    with torch.no_grad():
        for length in (12, 17):
            other = inputs(style, length)
            same(fast(*other), alone(*other))
    _result_is_split(fast, user, alone)
    assert found.now == 0
    return found.most


def _result_is_split(fast: attnopt.OptimizedModel, user: Model, alone: attnopt.OptimizedModel) -> None:
    held = dict(fast.graph_module.named_parameters())
    assert all(isinstance(p, DTensor) for p in held.values())
    assert {name: tuple(p.shape) for name, p in held.items()} == {
        name: tuple(p.shape) for name, p in alone.graph_module.named_parameters()
    }
    assert held["mlps.0.0.weight"] is user.mlps[0].get_parameter("0.weight")


def results_of_split_models_are_made_whole(mesh: DeviceMesh) -> None:
    given = (batches()[0],)
    fast = optimize(sharded(model(Style()), mesh), PruneHeads(heads=[1]), given)
    alone = attnopt.optimize(model(Style()), PruneHeads(heads=[1]), given)
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(DistributedError, match="is split over several processes"):
            fast.save(folder)
        with pytest.raises(DistributedError, match="is split over several processes"):
            context_parallel(fast, mesh)
        whole = gathered(fast)
        whole.save(f"{folder}/whole")
        loaded = attnopt.load(f"{folder}/whole")
    with torch.no_grad():
        for made in (fast, whole, loaded):
            same(made(*given), alone(*given), 1e-6)
    window = LocalWindow(left=3, right=0)
    again, want = optimize(fast, window, given), attnopt.optimize(alone, window, given)
    with torch.no_grad():
        same(again(*given), want(*given), 1e-6)


def gradients_of_split_results_are_means(mesh: DeviceMesh) -> None:
    """As of ``fully_shard``: each rank has its own loss."""
    given = batches(mesh.size())[mesh.get_rank()]
    user = sharded(model(Style(), dtype=torch.float64), mesh)
    fast = optimize(user, PruneHeads(heads=[0]), (batches()[0],))
    alone = attnopt.optimize(model(Style(), dtype=torch.float64), PruneHeads(heads=[0]), (batches()[0],))
    for one in (fast, alone):
        one(given).square().sum().backward()
    for (name, p), q in zip(fast.named_parameters(), alone.parameters(), strict=True):
        assert p.grad is not None
        if q.grad is None:
            continue
        dist.all_reduce(q.grad)
        assert isinstance(p.grad, DTensor), name
        same(p.grad.full_tensor(), q.grad / mesh.size(), 1e-10)


def every_rank_with_all_data_gives_the_same(mesh: DeviceMesh) -> None:
    """Then methods that need all data in one process work, too; weights over a mesh of two axes."""
    both = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("copies", "shards"))
    given, every = (batches()[0],), batches(3)
    for policy in (GroupedQuery(2), [LocalWindow(left=3, right=0), PruneHeads(0.25, budget="site")]):
        alone = attnopt.optimize(model(Style()), policy, given, calibration=every)
        fast = optimize(sharded(model(Style()), both), policy, given, calibration=every)
        with torch.no_grad():
            same(fast(*given), alone(*given))
    with pytest.raises(DistributedError, match="the calibration data on rank 1 differ"):
        optimize(
            sharded(model(Style()), mesh), "fuse", given, calibration=batches(mesh.size() + 2)[mesh.get_rank() :][:3]
        )


class Heads(nn.Module):
    """Each process has some heads, as many as its part of the weights has."""

    def __init__(self, reads_width: bool) -> None:
        super().__init__()
        self.reads_width = reads_width
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scale = DIM / q.shape[1] if self.reads_width else 1.0
        return x + self.out((nn.functional.scaled_dot_product_attention(q, k, v) * scale).transpose(1, 2).flatten(2))


def tensor_parallel_models_are_optimized(mesh: DeviceMesh) -> None:
    up, down = ColwiseParallel(), RowwiseParallel()
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(4))

    def made(reads_width: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Heads(reads_width), Heads(reads_width)).eval()

    plan = {f"*.{name}": up for name in "qkv"} | {"*.out": down}
    policy = PruneHeads(heads=[2])
    alone = attnopt.optimize(made(False), policy, (x,))
    fast = optimize(parallelize_module(made(False), mesh, plan), policy, (x,))
    with torch.no_grad():
        same(fast(x), alone(x))
    with pytest.raises(DistributedError, match="computes something else than split"):
        optimize(parallelize_module(made(True), mesh, plan), policy, (x,))


def split_models_that_cannot_be_read_are_refused(mesh: DeviceMesh) -> None:
    given, every = (batches()[0],), batches()
    with pytest.raises(DistributedError, match="no parameter of the model is a DTensor"):
        optimize(model(Style()), "fuse", given)
    user = sharded(model(Style()), mesh)
    with pytest.raises(CaptureError, match="is split over several processes"):
        attnopt.optimize(user, "fuse", given)
    with pytest.raises(DistributedError, match="needs example inputs"):
        optimize(user)
    with pytest.raises(DistributedError, match="the example inputs on rank 1 differ"):
        optimize(user, "fuse", (batches(2)[mesh.get_rank() % 2],))
    uneven = share_calibration(every[: 1 + mesh.get_rank()], mesh)
    with pytest.raises(CalibrationError, match="different numbers of calibration batches"):
        optimize(user, PruneHeads(0.5), given, calibration=uneven)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(DistributedError, match="computes something else than split"):
        optimize(sharded(model(Style()), mesh, mp_policy=half), "fuse", given)


def a_rank_that_fails_while_weights_are_gathered_ends_all(mesh: DeviceMesh) -> None:
    """Wherever that is: while attentions are found, too, where an error is a near miss otherwise."""
    given, every, plain = (batches()[0],), batches(), split_model.whole_of

    for last in (2, 12, 60):
        calls = 0

        def gathered_whole(x: DTensor) -> Tensor:
            nonlocal calls
            calls += 1
            made = plain(x)
            if calls == last and mesh.get_rank() == 1:  # noqa: B023
                raise MemoryError("no memory")
            return made

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(split_model, "whole_of", gathered_whole)
            patched.delenv("ATTNOPT_DEBUG", raising=False)
            wanted = "no memory" if mesh.get_rank() == 1 else "rank 1 failed: MemoryError: no memory"
            with pytest.raises(Exception, match=wanted) as raised:
                optimize(sharded(model(Style()), mesh), PruneHeads(0.5), given, calibration=shared(mesh, every))
        assert isinstance(raised.value, DistributedError) == (mesh.get_rank() != 1)
        assert calls <= last + (mesh.get_rank() != 1)  # nothing more is asked
