"""The driver: capture, match, decide, lower, verify."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.user_warning import warn
from attnopt.capture.capture import capture, require_values
from attnopt.capture.dynamic_axes import Auto, named_arguments
from attnopt.capture.program import Program
from attnopt.capture.run_unchanged import trains_otherwise
from attnopt.compiler.bound_inputs import bound, check_names
from attnopt.compiler.check import Checker
from attnopt.compiler.decide import Decision
from attnopt.compiler.job import Job, Options, backends_of
from attnopt.compiler.origin import FileOrigin, Origin, is_file
from attnopt.compiler.plan import plan, without_effect
from attnopt.compiler.policy import Policy
from attnopt.compiler.recall import with_recall
from attnopt.compiler.settle import settled
from attnopt.compiler.site_report import site_report
from attnopt.errors import CaptureError, RewriteError, VerificationError
from attnopt.graph.evaluate import dynamic_axes
from attnopt.graph.nodes import stored
from attnopt.lower.fixed_operands import FixedOperands, store_fixed_operands
from attnopt.lower.lower import Rewritten, rewritten
from attnopt.match.find import Findings, find
from attnopt.report.report import Report
from attnopt.version import __version__


@dataclass(frozen=True)
class Compiled:
    """An optimized graph with where it comes from, the program that it was made of, and what was found and decided."""

    module: fx.GraphModule
    origin: Origin
    program: Program
    findings: Findings
    decisions: tuple[Decision, ...]


def compiled(
    model: nn.Module,
    policy: object,
    inputs: CallInputs,
    batches: Sequence[CallInputs],
    options: Options,
    dynamic_shapes: object = "auto",
) -> Compiled:
    """What ``optimize`` does on these inputs."""
    return carried_out(Job(model, Policy.of(policy), inputs, dynamic_shapes, batches, backends_of("auto"), options))


def carried_out(job: Job) -> Compiled:
    """The job with as many dynamic axes as the model and the result allow.  Raises AttnoptError."""
    require_values(job.model)
    clock, shapes = _Clock(), job.dynamic_shapes
    while True:
        with clock.stage("capture"):
            program = capture(job.model, job.inputs, shapes, job.own)
        try:
            return _of_program(job, program, clock)
        except (CaptureError, VerificationError) as e:
            if program.narrower is None or (isinstance(e, VerificationError) and program.narrower != Auto(2)):
                raise  # fewer axes would give the same result
        shapes = program.narrower


def again(job: Job, made: Compiled) -> Compiled:
    """Another job on a model whose attentions are found already.  Raises AttnoptError."""
    return _with_findings(job, made.program, made.findings, _Clock(), _Warnings())


def _of_program(job: Job, program: Program, clock: _Clock) -> Compiled:
    told = _Warnings()
    told.all_of(_broken_weights(program))
    with clock.stage("match"):
        findings = find(program)
    return _with_findings(job, program, findings, clock, told)


def _with_findings(job: Job, program: Program, findings: Findings, clock: _Clock, told: _Warnings) -> Compiled:
    # Asked now: lowering can fix a symbol, and the captured graph shares it.
    dynamic = dynamic_axes(program.module.graph)
    if job.policy.inputs:
        check_names(program.module.graph, named_arguments(job.model.forward, *program.inputs)[0], job.policy.inputs)
    with clock.stage("rewrite"):
        policy = settled(job, program, findings)
        decisions = plan(job, program, findings, policy)
    told.all_of(without_effect(job, findings, policy, decisions))
    plans = [d.plan for d in decisions if d.plan is not None]
    program = bound(program, plans)
    dynamic &= dynamic_axes(program.module.graph)
    with clock.stage("lower"):
        made = rewritten(program.module, plans, joins=not is_file(job.model))
        module = made.module
        fixed = [] if is_file(job.model) else store_fixed_operands(module, trains=job.model.training)
    _check_axes(dynamic - dynamic_axes(module.graph))
    with clock.stage("verify"):
        checker = Checker(job.model, program, plans, job.options.seed, job.peers)
        error, found = checker.check(module)
        told.all_of(found)
        on_batches = checker.error_on(module, job.batches, job.signature(module))
        error = max(error, *([on_batches] if job.peers is None else job.peers.everyone(on_batches)))
        _check_tolerance(error, job.options.tolerance)
        decisions = _with_notes(with_recall(job, program, decisions), fixed, made)
    report = Report(
        sites=tuple(map(site_report, decisions)),
        near_misses=findings.near_misses,
        policy=job.policy.to_json(),
        error=error,
        seconds=dict(clock.seconds),
        warnings=tuple(told.texts),
        versions={"attnopt": __version__, "torch": torch.__version__},
        fixed_axes=program.fixed_axes,
    )
    if any(p.edits for p in plans):
        gc.collect()  # graphs refer to themselves: a temporary graph would keep its new weights alive for long
    return Compiled(module, _origin(job, program, decisions, module, report), program, findings, tuple(decisions))


def _origin(
    job: Job, program: Program, decisions: Sequence[Decision], module: fx.GraphModule, report: Report
) -> Origin:
    live = stored(module)
    plans = tuple(d.plan for d in decisions if d.plan is not None)
    return Origin(
        report=report,
        sites=tuple(replace(d.site.stored_as(live), refusals=d.refusals) for d in decisions),
        signature=job.signature(module),
        inputs=program.inputs,
        shapes=program.shapes,
        trains_otherwise=trains_otherwise(job.model),
        form=program.form,
        file=FileOrigin(job.model, program.module, plans, _named_in_file(job, program)) if is_file(job.model) else None,
    )


def _named_in_file(job: Job, program: Program) -> tuple[str, ...]:
    """What a file calls the inputs of the graph, in their order; one that a policy adds has the same name there."""
    model: Any = job.model
    names = {said: name for name, said in model.inputs.items()}
    return tuple(names.get(said, said) for said in named_arguments(model.forward, *program.inputs)[0])


def _with_notes(decisions: Sequence[Decision], fixed: Sequence[FixedOperands], made: Rewritten) -> list[Decision]:
    """What lowering found out."""
    told: dict[str, list[str]] = {f.site: [str(f)] for f in fixed}
    for site, roles in made.whole.items():
        if roles:
            names = " and ".join(roles)
            text = f"the {names} weights of all heads stay, because the model also returns or reads what they project"
            told.setdefault(site, []).append(text)
    return [replace(d, notes=(*d.notes, *told.get(d.found.site.name, ()))) for d in decisions]


def _broken_weights(program: Program) -> Iterator[str]:
    """NaN in the weights makes every comparison blind."""
    floats = ((n, p) for n, p in program.module.named_parameters() if p.is_floating_point())
    broken = [name for name, p in floats if not bool(torch.isfinite(p.detach()).all())]
    if broken:
        listed = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        yield f"NaN or infinities in the weights ({listed}): the result could not be compared"


def _check_axes(lost: set[tuple[str, int]]) -> None:
    """An axis that was dynamic has to stay so."""
    if lost:
        listed = ", ".join(f"axis {axis} of {name}" for name, axis in sorted(lost))
        raise RewriteError(
            f"the rewritten graph is valid only at the size of the example for {listed}",
            hint="remove it from dynamic_shapes, find the site with limit=1, 2, ..., and report the model",
        )


def _check_tolerance(error: float, tolerance: float | None) -> None:
    if tolerance is not None and not error <= tolerance:
        raise VerificationError(
            f"the rewritten model differs from the original by {error:.3g} (relative), "
            f"more than the tolerance {tolerance:g}",
            hint="choose a less aggressive policy, or fewer sites",
        )


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class _Warnings:
    """Warnings as they are raised, kept for the report."""

    texts: list[str] = field(default_factory=list)

    def all_of(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.texts.append(text)
            warn(text)
