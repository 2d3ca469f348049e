"""What several ranks check together, run by ``ranks.on_ranks``: each function is called on every rank, in their order."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import split_checks
import torch
import torch.distributed as dist
from parallel_models import VOCABULARY, Style, inputs, model, translated, translator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import attnopt
from attnopt import Choice
from attnopt.cli.demo_data import let_transformers_import
from attnopt.distributed import ContextParallel, context_parallel, peers, plan, share_calibration, tensor_parallel
from attnopt.errors import CalibrationError, DistributedError
from attnopt.passes import (
    DynamicSparse,
    EvictKeys,
    GroupedQuery,
    LocalWindow,
    PruneHeads,
    RouteHeads,
    SegmentGain,
    Sparse,
)
from attnopt.patterns import Causal, Keys, PerHead, Window
from attnopt.policy_search.problem import Problem
from attnopt.policy_search.refits import Refits

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
    _same_gradients(mesh, replace(DECODER, sinks=True), "fuse", "keys")
    heads = "heads" if mesh.size() <= DECODER.kv_heads else "auto"  # a rank has whole groups
    _same_gradients(mesh, replace(DECODER, sinks=True), TAIL, heads)


@check
def outputs_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    for style in STYLES:
        one = optimized(style)
        for layout in ("contiguous", "zigzag"):
            parallel = context_parallel(one, mesh, layout=layout, method="keys")
            for length in (9, 13):
                compared(parallel, one, inputs(style, length), 1e-6)


@check
def windows_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    for style in STYLES:
        one = optimized(style, TAIL if style.causal else LocalWindow(left=WINDOW, right=1, sinks=SINKS))
        parallel = context_parallel(one, mesh, method="keys")
        for length in (9, 37):
            compared(parallel, one, inputs(style, length), 1e-6)


@check
def heads_on_ranks_give_the_same(mesh: DeviceMesh) -> None:
    """GQA, unequal groups, patterns that differ by head, sinks, padding."""
    by_head = Sparse(PerHead({0: Window(2, 0), 3: Causal() & ~Window(1, 0)}, Causal()))
    for style, policy in (
        (Style(rope=True, padding=True, sinks=True), by_head),
        (replace(DECODER, heads=6, kv_heads=6), PruneHeads(heads=[1])),
        (Style(causal=False, softcap=5.0, relative=True), LocalWindow(left=WINDOW, right=1, sinks=SINKS)),
    ):
        _same_gradients(mesh, style, policy, "heads")


@check
def heads_that_ranks_cannot_share_are_refused(mesh: DeviceMesh) -> None:
    gains = SegmentGain(Window(2, 0), 0.5)
    for style, policy, why in (
        (Style(), gains, "its log-sum-exps are merged with those of other keys"),
        (STYLES[2], "fuse", f"they read 1 key/value heads, fewer than {mesh.size()} ranks"),
    ):
        with pytest.raises(DistributedError, match=why):
            context_parallel(optimized(style, policy), mesh, method="heads")


@check
def gains_on_weights_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    """Their parts are merged by log-sum-exps, which get gradients."""
    for normalise in ("logits", "none"):
        _same_gradients(
            mesh, DECODER, SegmentGain([Keys([0, 5]), Window(2, 0)], (0.5, 2.0), normalise=normalise), "auto"
        )


@check
def keys_of_another_sequence_are_whole_on_every_rank(mesh: DeviceMesh) -> None:
    """Of an input, and of an encoder that each rank runs."""
    for encodes, backend in ((False, "sdpa"), (True, "blocked")):
        given = translated(encodes, 10, 7)
        one = attnopt.optimize(translator(encodes), "fuse", given, dynamic_shapes="auto", backend=backend)
        alone, parallel = copy.deepcopy(one), context_parallel(one, mesh)
        for length, others in ((13, 9), (11, 8)):
            given = translated(encodes, length, others)
            want, got = alone(*given), parallel(*given)
            same(got, parallel.own(want), 1e-12)
        want.square().sum().backward()
        got.square().sum().backward()
        parallel.reduce_gradients()
        _compare_gradients(one, alone)
        assert len(parallel.plan(*given).attentions) == 2


@check
def the_longer_of_two_sequences_is_shared(mesh: DeviceMesh) -> None:
    given = translated(True, 5, 23)
    one = attnopt.optimize(translator(True), "fuse", given, dynamic_shapes="auto", backend="blocked")
    parallel = context_parallel(one, mesh, outputs="whole")
    same(parallel(*given), one(*given), 1e-12)
    assert parallel.plan(*given).length == 23
    assert len(parallel.plan(*given).attentions) == 1


@check
def gradients_of_biases_and_sinks_are_those_of_one_rank(mesh: DeviceMesh) -> None:
    _same_gradients(mesh, replace(ENCODER, sinks=True), "fuse")
    _same_gradients(mesh, replace(DECODER, relative=True, alibi=True), TAIL)


def _same_gradients(mesh: DeviceMesh, style: Style, policy: object, method: str = "keys") -> None:
    """In double precision, where rounding hides nothing."""
    one = optimized(style, policy, torch.float64)
    alone, given = copy.deepcopy(one), inputs(style, 13)
    want = alone(*given)
    want.square().sum().backward()
    parallel = context_parallel(one, mesh, method=method)
    got = parallel(*given)
    same(got, parallel.own(want), 1e-12)
    got.square().sum().backward()
    parallel.reduce_gradients()
    _compare_gradients(one, alone)


def _compare_gradients(got: torch.nn.Module, want: torch.nn.Module) -> None:
    wanted = dict(want.named_parameters())
    for name, p in got.named_parameters():
        if wanted[name].grad is None:  # it is read by nothing
            assert p.grad is None or not p.grad.any()
        else:
            same(p.grad, wanted[name].grad, 1e-10)
        p.grad = None


@check
def whole_outputs_have_the_same_gradients(mesh: DeviceMesh) -> None:
    for style in (ENCODER, replace(ENCODER, pooled=True)):
        fast = optimized(style, dtype=torch.float64)
        alone, given = copy.deepcopy(fast), inputs(style, 11)
        want = alone(*given)
        want.square().sum().backward()
        parallel = context_parallel(fast, mesh, outputs="whole", method="keys")
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
    planned = parallel.plan(*given)
    assert planned.bytes(mesh.get_rank()) == sum(seen)
    assert all(a.method == "halo" for a in planned.attentions)


@check
def what_arrives_is_what_was_planned_without_the_ranks(mesh: DeviceMesh) -> None:
    """By either method, and with outputs that are collected."""
    for style, policy in ((DECODER, TAIL), (Style(causal=False, pooled=True), "fuse")):
        one = optimized(style, policy)
        for options in ({"method": "keys"}, {"method": "heads", "outputs": "whole"}, {}):
            if style.kv_heads < mesh.size() and options.get("method") == "heads":
                continue
            parallel, given = context_parallel(one, mesh, **options), inputs(style, 29)
            with torch.no_grad():
                parallel(*given)
            planned = plan(one, mesh.size(), 29, **options)
            assert planned == parallel.plan(*given)
            assert planned.bytes(mesh.get_rank()) == sum(parallel.received.values())


@check
def the_method_that_sends_less_is_chosen(mesh: DeviceMesh) -> None:
    one = optimized(Style(layers=1))
    planned = {m: context_parallel(one, mesh, method=m).plan(*inputs(Style(), 32)) for m in ("keys", "heads", "auto")}
    most = {m: max(map(p.bytes, range(mesh.size()))) for m, p in planned.items()}
    assert most["auto"] == min(most.values())
    assert (most["heads"] < most["keys"]) == (mesh.size() == 4)
    assert planned["heads"].attentions[0].method == "all-to-all"


@check
def causal_ranks_send_half_of_all_pairs(mesh: DeviceMesh) -> None:
    parallel = context_parallel(optimized(Style()), mesh, layout="contiguous", method="keys")
    planned = parallel.plan(*inputs(Style(), 32))
    assert planned.attentions[0].tokens == tuple(32 // mesh.size() * r for r in range(mesh.size()))
    balanced = context_parallel(optimized(Style()), mesh, method="keys").plan(*inputs(Style(), 32))
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
def blocks_that_are_chosen_at_run_time_are_refused(mesh: DeviceMesh) -> None:
    length = 256
    one = optimized(Style(layers=1), DynamicSparse("pooled", keep=2, block=64), length=length)
    with pytest.raises(DistributedError, match="its blocks are selected at run time"):
        context_parallel(one, mesh)


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


# ---------------------------------------------------------------- tensor parallel
@check
def weights_on_ranks_give_the_same(mesh: DeviceMesh) -> None:
    """With groups of keys, patterns that differ by head, sinks, and without a plan for some layers."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    up, down = ColwiseParallel(), RowwiseParallel()
    plan_of = {"attentions.*.q": up, "attentions.*.kv": up, "attentions.*.out": down, "mlps.*.0": up, "mlps.*.2": down}
    by_head = Sparse(PerHead({0: Window(2, 0), 3: Causal() & ~Window(1, 0)}, Causal()))
    for style, policy in ((DECODER, "fuse"), (Style(sinks=True, alibi=True), by_head), (ENCODER, "fuse")):
        one = optimized(style, policy, torch.float64)
        alone = copy.deepcopy(one)
        parallel = tensor_parallel(one, mesh, plan_of)
        for length in (9, 13):
            given = inputs(style, length)
            want, got = alone(*given), parallel(*given)
            same(got, want, 1e-12)
        assert all("heads on each rank" in way for way in parallel.attentions.values()), parallel.attentions
        got.square().sum().backward()
        want.square().sum().backward()
        wanted = dict(alone.named_parameters())
        for name, p in parallel.inner.named_parameters():
            assert isinstance(p.grad, DTensor)
            same(p.grad.full_tensor(), wanted[name].grad, 1e-10)


@check
def heads_that_do_not_divide_are_whole_on_each_rank(mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    style = Style(heads=5, kv_heads=5, layers=1)
    one = optimized(style, "fuse")
    parallel = tensor_parallel(one, mesh, {"attentions.0.q": ColwiseParallel(), "attentions.0.out": RowwiseParallel()})
    same(parallel(*inputs(style, 12)), one(*inputs(style, 12)), 1e-6)
    assert list(parallel.attentions.values()) == ["whole on each rank: 5 heads"]


@check
def plans_that_name_nothing_are_refused(mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel

    one = optimized(Style(layers=1))
    with pytest.raises(DistributedError, match=r"the plan names 'attentions.0.k', .*\n.*attentions.0.kv"):
        tensor_parallel(one, mesh, {"attentions.0.k": ColwiseParallel()})
    with pytest.raises(DistributedError, match=r"the plan has a SequenceParallel for 'norms.0.weight'"):
        tensor_parallel(one, mesh, {"norms.0": SequenceParallel()})
    with pytest.raises(DistributedError, match="the plan on rank 1 differs from"):
        tensor_parallel(one, mesh, {f"attentions.0.{'kv' if mesh.get_rank() else 'q'}": ColwiseParallel()})


@check
def sharded_weights_are_refused_by_optimize(mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    user = model(Style(layers=1))
    fully_shard(user, mesh=mesh)
    with pytest.raises(attnopt.CaptureError, match="is split over several processes"):
        attnopt.optimize(user, "fuse", inputs(Style(), 10))


# ---------------------------------------------------------------- search
@check
def a_search_gives_the_result_of_one_process(mesh: DeviceMesh) -> None:
    user, given, measured = model(Style()), (_batches()[0],), list[int]()
    space, budget = {"*": Choice(None, LocalWindow(left=4, right=0), PruneHeads(0.5))}, attnopt.Budget(flops=0.93)
    plain = Problem._measured

    def counted(asked: Problem, picks: Any, piece: int) -> Any:
        measured.append(piece)
        return plain(asked, picks, piece)

    def searched(**options: Any) -> Any:
        measured.clear()
        found = attnopt.search(user, space, given, calibration=_batches() * 2, budget=budget, evaluations=12, **options)
        return found.policy.to_json(), {**found.report.to_json(), "seconds": 0}, len(measured)

    refits = Refits.of
    Problem._measured = counted  # type: ignore[method-assign]
    Refits.of = lambda made, batches: None  # type: ignore[method-assign]  # which several processes do without
    try:
        policy, report, alone = searched()
        shared_policy, shared_report, own = searched(peers=peers(mesh))
    finally:
        Problem._measured = plain  # type: ignore[method-assign]
        Refits.of = refits  # type: ignore[method-assign]
    assert (shared_policy, shared_report) == (policy, report)
    assert own <= alone / mesh.size() + 12


@check
def a_rank_that_searches_other_choices_is_refused(mesh: DeviceMesh) -> None:
    space = {"*": Choice(None, LocalWindow(left=4 + mesh.get_rank(), right=0))}
    with pytest.raises(DistributedError, match="the policy on rank 1 differs from"):
        attnopt.search(
            model(Style()), space, (_batches()[0],), calibration=_batches(), budget=attnopt.Budget(flops=0.93),
            peers=peers(mesh),
        )  # fmt: skip


# ---------------------------------------------------------------- a user's class
@check
def converted_models_are_split_as_users_do(mesh: DeviceMesh) -> None:
    """``parallelize_module`` on the modules of a transformers model; a pattern that differs by head is refused there."""
    let_transformers_import()
    from tiny_llama import tiny_llama
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    up, down = ColwiseParallel(), RowwiseParallel()
    split = {f"model.layers.*.self_attn.{name}": up for name in ("q_proj", "k_proj", "v_proj")}
    split["model.layers.*.self_attn.o_proj"] = down
    ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(5))
    by_head = Sparse(Causal() & PerHead({0: Window(3, 0)}, Window(6, 0)))
    for policy in (LocalWindow(left=4, right=0), by_head):
        user = attnopt.convert(tiny_llama(4), policy, kwargs={"input_ids": ids})
        want = user(ids).logits
        parallelize_module(user, mesh, split)
        if policy is not by_head:
            with torch.no_grad():
                same(user(ids).logits, want, 1e-5)
            continue
        with pytest.raises(attnopt.ConversionError, match=f"this process has {4 // mesh.size()} of 4 heads"):
            user(ids)


@check
def generation_under_tensor_parallel_is_that_of_one_rank(mesh: DeviceMesh) -> None:
    """Each rank caches the keys of its own heads: rolling windows, sinks beside them, and keys that heads choose."""
    let_transformers_import()
    from tiny_llama import tiny_llama
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    up, down = ColwiseParallel(), RowwiseParallel()
    split = {f"model.layers.*.self_attn.{name}": up for name in ("q_proj", "k_proj", "v_proj")}
    split["model.layers.*.self_attn.o_proj"] = down
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    found = []
    for policy in (
        LocalWindow(left=4, right=0),
        LocalWindow(left=4, right=0, sinks=2),
        EvictKeys("h2o", budget=6),
        EvictKeys("snapkv", budget=6),
    ):
        user = attnopt.convert(tiny_llama(4), policy, kwargs={"input_ids": ids})
        want = user.generate(ids, **options)
        found.append(tuple(want.flatten().tolist()))
        parallelize_module(user, mesh, split)
        assert torch.equal(user.generate(ids, **options), want), policy
    assert len(set(found)) > 1, "the policies make no difference"


# ---------------------------------------------------------------- models that are split already
quick(split_checks.split_models_are_calibrated_as_whole_ones)
quick(split_checks.gradients_of_split_results_are_means)
for _run in (
    split_checks.what_a_rank_gathers_does_not_grow_with_layers,
    split_checks.results_of_split_models_are_made_whole,
    split_checks.every_rank_with_all_data_gives_the_same,
    split_checks.tensor_parallel_models_are_optimized,
    split_checks.split_models_that_cannot_be_read_are_refused,
    split_checks.a_rank_that_fails_while_weights_are_gathered_ends_all,
):
    check(_run)
