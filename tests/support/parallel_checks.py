"""What several ranks check together, run by ``ranks.on_ranks``: each function is called on every rank, in their order."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_models import VOCABULARY, Style, inputs, model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import attnopt
from attnopt.distributed import ContextParallel, context_parallel, share_calibration
from attnopt.errors import CalibrationError, DistributedError
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, RouteHeads

CHECKS: dict[str, Callable[[DeviceMesh], None]] = {}
QUICK: list[str] = []  # those that two ranks run in the fast suite
WINDOW, SINKS = 3, 2

DECODER = Style(kv_heads=2, rope=True, padding=True)
ENCODER = Style(causal=False, softcap=5.0, relative=True)
STYLES = (DECODER, ENCODER, Style(kv_heads=1, sinks=True, alibi=True, layers=1))
TAIL = LocalWindow(left=WINDOW, right=0, sinks=SINKS)


def check(run: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    CHECKS[run.__name__] = run
    return run


def quick(run: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    QUICK.append(run.__name__)
    return check(run)


@cache
def optimized(
    style: Style, policy: object = "fuse", dtype: torch.dtype = torch.float32, seed: int = 0, length: int = 10
) -> Any:
    user = model(style, seed, dtype)
    return attnopt.optimize(user, policy, inputs(style, length), dynamic_shapes="auto", backend="blocked")


def same(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    apart = float((got - want).detach().abs().max() / want.detach().abs().max())
    assert apart <= tolerance, apart


def compared(parallel: ContextParallel, fast: torch.nn.Module, given: tuple[Tensor, ...], tolerance: float) -> None:
    with torch.no_grad():
        same(parallel(*given), parallel.own(fast(*given)), tolerance)


@quick
def outputs_and_gradients_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    for style, policy in ((DECODER, "fuse"), (replace(DECODER, sinks=True), TAIL)):
        _same_gradients(mesh, style, policy)


@check
def outputs_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    for style in STYLES:
        one = optimized(style)
        for layout in ("contiguous", "zigzag"):
            parallel = context_parallel(one, mesh, layout=layout)
            for length in (9, 13):
                compared(parallel, one, inputs(style, length), 1e-6)


@check
def windows_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    for style in STYLES:
        one = optimized(style, TAIL if style.causal else LocalWindow(left=WINDOW, right=1, sinks=SINKS))
        parallel = context_parallel(one, mesh)
        for length in (9, 37):
            compared(parallel, one, inputs(style, length), 1e-6)


@check
def gradients_of_biases_and_sinks_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    _same_gradients(mesh, replace(ENCODER, sinks=True), "fuse")
    _same_gradients(mesh, replace(DECODER, relative=True, alibi=True), TAIL)


def _same_gradients(mesh: DeviceMesh, style: Style, policy: object) -> None:
    """In double precision, where rounding hides nothing."""
    one = optimized(style, policy, torch.float64)
    alone, given = copy.deepcopy(one), inputs(style, 13)
    want = alone(*given)
    want.square().sum().backward()
    parallel = context_parallel(one, mesh)
    got = parallel(*given)
    same(got, parallel.own(want), 1e-12)
    got.square().sum().backward()
    parallel.reduce_gradients()
    _compare_gradients(one, alone)


def _compare_gradients(got: torch.nn.Module, want: torch.nn.Module) -> None:
    wanted = dict(want.named_parameters())
    for name, p in got.named_parameters():
        same(p.grad, wanted[name].grad, 1e-10)
        p.grad = None


@check
def whole_outputs_have_the_same_gradients(mesh: DeviceMesh) -> None:
    for style in (ENCODER, replace(ENCODER, pooled=True)):
        fast = optimized(style, dtype=torch.float64)
        alone, given = copy.deepcopy(fast), inputs(style, 11)
        want = alone(*given)
        want.square().sum().backward()
        parallel = context_parallel(fast, mesh, outputs="whole")
        got = parallel(*given)
        same(got, want, 1e-12)
        (got.square().sum() / mesh.size()).backward()
        parallel.reduce_gradients()
        _compare_gradients(fast, alone)


@quick
def windows_send_a_tail_and_sinks(mesh: DeviceMesh) -> None:
    """Counted where torch is asked to receive."""
    style, length = STYLES[2], 64
    parallel = context_parallel(optimized(style, TAIL), mesh)
    given, seen, plain = inputs(style, length), [], dist.batch_isend_irecv

    def counted(asked: list[dist.P2POp]) -> list[dist.Work]:
        seen.extend(p.tensor.numel() * p.tensor.element_size() for p in asked if p.op is dist.irecv)
        return plain(asked)

    dist.batch_isend_irecv = counted
    try:
        parallel(*given)
    finally:
        dist.batch_isend_irecv = plain
    per_token = 2 * 2 * 1 * 8 * 4  # batch, keys and values, heads, features, bytes
    assert sum(seen) <= style.layers * (WINDOW + SINKS) * per_token
    assert sum(seen) == sum(parallel.received.values())
    plan = parallel.plan(*given)
    assert sum(a.bytes[mesh.get_rank()] for a in plan.attentions) == sum(seen)
    assert all(a.method == "halo" for a in plan.attentions)


@check
def causal_ranks_send_half_of_all_pairs(mesh: DeviceMesh) -> None:
    parallel = context_parallel(optimized(Style()), mesh, layout="contiguous")
    plan = parallel.plan(*inputs(Style(), 32))
    assert plan.attentions[0].tokens == tuple(32 // mesh.size() * r for r in range(mesh.size()))
    balanced = context_parallel(optimized(Style()), mesh).plan(*inputs(Style(), 32))
    assert len(set(balanced.tokens)) == 1
    assert "zigzag" in str(balanced)


@quick
def ranks_with_other_weights_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(DistributedError, match="the weights on rank 1 differ from"):
        context_parallel(optimized(Style(), seed=mesh.get_rank()), mesh)


@check
def ranks_with_other_policies_are_refused(mesh: DeviceMesh) -> None:
    policy = "fuse" if mesh.get_rank() else PruneHeads(heads=[0])
    with pytest.raises(DistributedError, match="the policy on rank"):
        context_parallel(optimized(Style(), policy), mesh)


@check
def a_rank_that_fails_fails_everywhere(mesh: DeviceMesh) -> None:
    fast = optimized(Style()) if mesh.get_rank() else torch.nn.Linear(2, 2)
    why = "rank 0 failed while reading" if mesh.get_rank() else "found Linear"
    with pytest.raises(DistributedError, match=why):
        context_parallel(fast, mesh)


@quick
def operators_between_attentions_that_mix_tokens_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(
        DistributedError, match=r"cumsum \(parallel_models.py:\d+\) between two attentions mixes tokens"
    ):
        context_parallel(optimized(replace(DECODER, mixes=True)), mesh)


@check
def sequences_shorter_than_the_ranks_are_refused(mesh: DeviceMesh) -> None:
    parallel = context_parallel(optimized(Style()), mesh)
    length = mesh.size() - 1
    if length > 1:  # which is another graph
        with pytest.raises(DistributedError, match=f"{length} tokens cannot be shared by {mesh.size()} ranks"):
            parallel(*inputs(Style(), length))


@check
def meshes_without_the_axis_are_refused(mesh: DeviceMesh) -> None:
    fast = optimized(Style(layers=1))
    with pytest.raises(DistributedError, match="the mesh has no axis 'data'\n  hint: its axes are 'sequence'"):
        context_parallel(fast, mesh, axis="data")
    both = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "sequence"))
    with pytest.raises(DistributedError, match="the mesh has 2 axes"):
        context_parallel(fast, both)
    compared(context_parallel(fast, both, axis="sequence"), fast, inputs(Style(), 13), 1e-6)
    with pytest.raises(DistributedError, match="expected a DeviceMesh, found str"):
        context_parallel(fast, "cpu")  # type: ignore[arg-type]


# ---------------------------------------------------------------- calibration
def _batches() -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (6, 12), generator=random) for _ in range(8)]


def _share(mesh: DeviceMesh) -> attnopt.Calibration:
    """The first rank has fewer batches than the last."""
    cuts = {2: [0, 3, 8], 4: [0, 1, 3, 5, 8]}[mesh.size()]
    rank = mesh.get_rank()
    return share_calibration(_batches()[cuts[rank] : cuts[rank + 1]], mesh)


@quick
def calibration_is_that_of_one_rank(mesh: DeviceMesh) -> None:
    user, given = model(Style()), (_batches()[0],)
    for policy in (PruneHeads(0.5), PruneHeads(0.25, importance="wanda", budget="site", compensate="bias")):
        alone = attnopt.optimize(user, policy, given, calibration=_batches())
        shared = attnopt.optimize(user, policy, given, calibration=_share(mesh))
        assert [s.spec.heads for s in shared.sites] == [s.spec.heads for s in alone.sites]
        with torch.no_grad():
            same(shared(*given), alone(*given), 1e-5)
        assert abs(shared.report.error / alone.report.error - 1) < 1e-4
        told: list[Any] = [None] * mesh.size()
        dist.all_gather_object(told, [p.detach().numpy().tobytes() for p in shared.parameters()])
        assert all(one == told[0] for one in told)


@check
def methods_that_need_all_data_in_one_process_are_refused(mesh: DeviceMesh) -> None:
    policies = (GroupedQuery(2, merge="procrustes"), PruneHeads(0.5, importance="entropy"), RouteHeads(router="linear"))
    for policy in policies:
        with pytest.raises(CalibrationError, match="needs all calibration data in one process"):
            attnopt.optimize(model(Style()), policy, (_batches()[0],), calibration=_share(mesh))
    with pytest.raises(CalibrationError, match="several processes share this calibration data"):
        attnopt.head_importance(model(Style()), _share(mesh))


@quick
def a_rank_with_bad_data_ends_the_job_on_all(mesh: DeviceMesh) -> None:
    own, user = _share(mesh), model(Style())
    if mesh.get_rank() == 1:
        own = replace(own, batches=(attnopt.Calibration.of([torch.zeros(6, 12)]).batches))
    start = time.monotonic()
    with pytest.raises(Exception, match="rank 1 failed: " if mesh.get_rank() != 1 else "") as raised:
        attnopt.optimize(user, PruneHeads(0.5), (_batches()[0],), calibration=own)
    assert isinstance(raised.value, DistributedError) == (mesh.get_rank() != 1)
    assert time.monotonic() - start < 30


@check
def ranks_that_calibrate_with_other_policies_are_refused(mesh: DeviceMesh) -> None:
    policy = PruneHeads(0.25 if mesh.get_rank() == 0 else 0.5)
    with pytest.raises(DistributedError, match="the policy on rank 1 differs from"):
        attnopt.optimize(model(Style()), policy, (_batches()[0],), calibration=_share(mesh))
