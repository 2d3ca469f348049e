"""What several ranks check together, run by ``ranks.on_ranks``: each function is called on every rank, in their order."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
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
WINDOW, SINKS = 3, 2

STYLES = {
    "causal": Style(),
    "full, positions by rope": Style(causal=False, rope=True),
    "grouped, causal, alibi": Style(kv_heads=2, alibi=True),
    "padding, softcap": Style(causal=False, padding=True, softcap=5.0),
    "causal, sinks, relative bias": Style(sinks=True, relative=True),
    "causal, padding, rope": Style(padding=True, rope=True, kv_heads=1),
}
WINDOWED = {"causal": STYLES["causal"], "padding, softcap": STYLES["padding, softcap"], "sinks": Style(sinks=True, kv_heads=2)}


def check(run: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    CHECKS[run.__name__] = run
    return run


def optimized(style: Style, policy: object = "fuse", dtype: torch.dtype = torch.float32, seed: int = 0, length: int = 10) -> Any:
    user = model(style, seed, dtype)
    return attnopt.optimize(user, policy, inputs(style, length), dynamic_shapes="auto", backend="blocked")


def same(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    apart = float((got - want).detach().abs().max() / want.detach().abs().max())
    assert apart <= tolerance, apart


def compared(parallel: ContextParallel, fast: torch.nn.Module, given: tuple[Tensor, ...], tolerance: float) -> None:
    with torch.no_grad():
        same(parallel(*given), parallel.own(fast(*given)), tolerance)


@check
def outputs_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    for style in STYLES.values():
        fast = optimized(style)
        for layout in ("contiguous", "zigzag"):
            parallel = context_parallel(fast, mesh, layout=layout)
            for length in (9, 13):
                compared(parallel, fast, inputs(style, length), 1e-6)


@check
def windows_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    for style in WINDOWED.values():
        fast = optimized(style, LocalWindow(left=WINDOW, right=0 if style.causal else 1, sinks=SINKS))
        parallel = context_parallel(fast, mesh)
        for length in (9, 37):
            compared(parallel, fast, inputs(style, length), 1e-6)


@check
def gradients_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    for name in ("grouped, causal, alibi", "causal, sinks, relative bias", "padding, softcap"):
        for policy in ("fuse", LocalWindow(left=WINDOW, sinks=SINKS)):
            fast = optimized(STYLES[name], policy, torch.float64)
            alone = copy.deepcopy(fast)
            given = inputs(STYLES[name], 13)
            alone(*given).square().sum().backward()
            parallel = context_parallel(fast, mesh)
            parallel(*given).square().sum().backward()
            parallel.reduce_gradients()
            wanted = dict(alone.named_parameters())
            for parameter, p in fast.named_parameters():
                same(p.grad, wanted[parameter].grad, 1e-10)


@check
def whole_outputs_have_the_same_gradients(mesh: DeviceMesh) -> None:
    for style in (Style(causal=False), Style(causal=False, pooled=True)):
        fast = optimized(style, dtype=torch.float64)
        alone, given = copy.deepcopy(fast), inputs(style, 11)
        want = alone(*given)
        want.square().sum().backward()
        parallel = context_parallel(fast, mesh, outputs="whole")
        got = parallel(*given)
        same(got, want, 1e-12)
        (got.square().sum() / mesh.size()).backward()
        parallel.reduce_gradients()
        wanted = dict(alone.named_parameters())
        for name, p in fast.named_parameters():
            same(p.grad, wanted[name].grad, 1e-10)


@check
def windows_send_a_tail_and_sinks(mesh: DeviceMesh) -> None:
    """Counted where torch is asked to receive."""
    style, length = Style(sinks=True, kv_heads=2), 64
    parallel = context_parallel(optimized(style, LocalWindow(left=WINDOW, sinks=SINKS)), mesh)
    given, seen, plain = inputs(style, length), [], dist.batch_isend_irecv

    def counted(asked: list[dist.P2POp]) -> list[dist.Work]:
        seen.extend(p.tensor.numel() * p.tensor.element_size() for p in asked if p.op is dist.irecv)
        return plain(asked)

    dist.batch_isend_irecv = counted
    try:
        parallel(*given)
    finally:
        dist.batch_isend_irecv = plain
    per_token = 2 * 2 * 2 * 8 * 4  # batch, keys and values, heads, features, bytes
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


@check
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


@check
def operators_between_attentions_that_mix_tokens_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(DistributedError, match=r"cumsum \(parallel_models.py:\d+\) between two attentions mixes tokens"):
        context_parallel(optimized(Style(mixes=True)), mesh)


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


@check
def calibration_is_that_of_one_rank(mesh: DeviceMesh) -> None:
    user, given = model(Style()), inputs(Style(), 12)
    for policy in (
        PruneHeads(0.5),
        PruneHeads(0.25, budget="site", compensate="bias"),
        PruneHeads(0.25, importance="wanda", compensate="least-squares"),
    ):
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
            attnopt.optimize(model(Style()), policy, inputs(Style(), 12), calibration=_share(mesh))
    with pytest.raises(CalibrationError, match="which only attnopt.optimize can use"):
        attnopt.head_importance(model(Style()), _share(mesh))


@check
def a_rank_with_bad_data_ends_the_job_on_all(mesh: DeviceMesh) -> None:
    own, user = _share(mesh), model(Style())
    if mesh.get_rank() == 1:
        own = dataclasses.replace(own, batches=(attnopt.Calibration.of([torch.zeros(4, 12)]).batches))
    start = time.monotonic()
    with pytest.raises(Exception, match="rank 1 failed: " if mesh.get_rank() != 1 else "") as raised:
        attnopt.optimize(user, PruneHeads(0.5), inputs(Style(), 12), calibration=own)
    assert isinstance(raised.value, DistributedError) == (mesh.get_rank() != 1)
    assert time.monotonic() - start < 30


@check
def ranks_that_calibrate_with_other_policies_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(DistributedError, match="the policy on rank 1 differs from"):
        attnopt.optimize(model(Style()), PruneHeads(0.25 * min(1 + mesh.get_rank(), 2)), inputs(Style(), 12), calibration=_share(mesh))
