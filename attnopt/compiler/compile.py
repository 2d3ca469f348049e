"""The driver: capture, find, let the passes decide, lower, verify, report."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Inputs
from attnopt.capture.capture import capture, require_values
from attnopt.capture.dynamic_axes import Auto
from attnopt.capture.program import Program
from attnopt.capture.run_unchanged import trains_otherwise
from attnopt.capture.signature import Signature
from attnopt.compiler import plugins
from attnopt.compiler.check import Checker, fitting
from attnopt.compiler.decide import Decision, decide, limited
from attnopt.compiler.head_budget import allot
from attnopt.compiler.origin import FileOrigin, Origin, is_file
from attnopt.compiler.policy import Policy
from attnopt.compiler.site_report import site_report
from attnopt.compiler.stream import Stream
from attnopt.compiler.tied_weights import jointly, of_all, tied
from attnopt.errors import CaptureError, PolicyError, RewriteError, VerificationError
from attnopt.fit.attention_recall import measured
from attnopt.graph.evaluate import dynamic_axes
from attnopt.graph.nodes import stored
from attnopt.ir.interfaces import Backend
from attnopt.lower.lower import lower
from attnopt.match.find import Findings, Found, find
from attnopt.match.prove import example_values
from attnopt.report.report import Report
from attnopt.version import __version__

if TYPE_CHECKING:
    pass


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


@dataclass(frozen=True)
class Compiled:
    """An optimized graph with its origin, its program, and the decisions of the passes."""

    module: fx.GraphModule
    origin: Origin
    program: Program
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Options:
    """As of ``optimize``.  Raises PolicyError."""

    tolerance: float | None = None
    strict: bool = False
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        limit, tolerance = self.limit, self.tolerance
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise PolicyError(f"limit must be a non-negative integer, not {limit!r}")
        if tolerance is not None and not tolerance >= 0:
            raise PolicyError(f"tolerance must be a number of at least 0, not {tolerance!r}")


def compiled(
    model: nn.Module,
    policy: Any,
    inputs: Inputs,
    batches: Sequence[Inputs],
    options: Options,
    dynamic_shapes: Any = "auto",
) -> Compiled:
    """What ``optimize`` does on these inputs."""
    return Job(model, Policy.of(policy), *inputs, dynamic_shapes, batches, backends_of("auto"), options).run()


def backends_of(backend: str | Backend) -> tuple[Backend, ...]:
    """The candidate backends; those of third parties only if named."""
    if isinstance(backend, Backend):
        return (backend,)
    if not isinstance(backend, str):
        raise PolicyError(f"backend must be a name or a Backend, not {type(backend).__name__}")
    if backend != "auto":
        return (plugins.make_backend(backend),)
    ours = [p for p in plugins.backends().values() if p.distribution == plugins.OURS]
    return tuple(plugins.make_backend(p.name) for p in ours)


@dataclass
class Job:
    """One model to compile under one policy."""

    model: nn.Module
    policy: Policy
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    batches: Sequence[Inputs]
    backends: tuple[Backend, ...]
    options: Options

    def run(self) -> Compiled:
        require_values(self.model)
        self.clock, shapes = _Clock(), self.dynamic_shapes
        while True:
            with self.clock.stage("capture"):
                program = capture(self.model, self.args, self.kwargs, shapes)
            try:
                return self._made_of(program)
            except (CaptureError, VerificationError) as e:
                if program.narrower is None or (isinstance(e, VerificationError) and program.narrower != Auto(2)):
                    raise  # fewer axes would give the same result
            shapes = program.narrower

    def _made_of(self, program: Program) -> Compiled:
        self.warnings = list[str]()
        self._look_at_weights(program)
        dynamic = dynamic_axes(program.module.graph)
        with self.clock.stage("match"):
            findings = find(program)
        with self.clock.stage("rewrite"):
            decisions = limited(self._decided(program, findings.found), self.options.limit)
        self._check_policy(findings, decisions)
        if self.options.strict:
            _raise_refusal(decisions)
        plans = [d.plan for d in decisions if d.plan is not None]
        with self.clock.stage("lower"):
            module = lower(program.module, plans, joins=not is_file(self.model))
        _check_axes(dynamic - dynamic_axes(module.graph))
        with self.clock.stage("verify"):
            error = self._verify(Checker(self.model, program, plans, self.options.seed), module)
            decisions = self._with_kept_mass(program, decisions)
        origin = self._origin(program, findings, decisions, module, error)
        if any(p.edits for p in plans):
            gc.collect()  # graphs refer to themselves: a temporary graph would keep its new weights alive for long
        return Compiled(module, origin, program, tuple(decisions))

    def _decided(self, program: Program, found: Sequence[Found]) -> list[Decision]:
        """The result of the passes at each site; passes that use calibration data get the activations of the site."""
        passes = {f.site.name: self.policy.passes_for(f.site.name) for f in found}
        learning = [f for f in found if any(p.calibrates for p in passes[f.site.name])]
        if not learning or not self.batches:
            return [decide(f, passes[f.site.name], self.backends) for f in found]
        batches = self._arranged(program)
        shares = allot(program.module, learning, self.policy, self.backends, batches)
        made = dict(shares.ready)
        undecided = [f for f in learning if f.site.name not in made]
        for group, activations in jointly(Stream(program.module, undecided, batches), tied(undecided, passes)):
            name = group[0].site.name
            chosen = [shares.passes.get((name, p), p) for p in passes[name]]
            decisions = of_all(group, decide(group[0], chosen, self.backends, activations))
            made.update({d.found.site.name: d for d in decisions})
        return [made.get(f.site.name) or decide(f, passes[f.site.name], self.backends) for f in found]

    def _arranged(self, program: Program) -> list[Inputs]:
        """The calibration batches in the form that the graph takes."""
        signature, made = self._signature(program.module), list[Inputs]()
        for i, (args, kwargs) in enumerate(self.batches):
            made.append(fitting(program.module, signature, (args, kwargs), i, program.form, fixed=program.fixed_axes))
        return made

    def _look_at_weights(self, program: Program) -> None:
        """NaN in the weights defeats every comparison."""
        floats = ((n, p) for n, p in program.module.named_parameters() if p.is_floating_point())
        broken = [name for name, p in floats if not bool(torch.isfinite(p.detach()).all())]
        if broken:
            listed = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
            self._warn(f"NaN or infinities in the weights ({listed}): the result could not be compared")

    def _check_policy(self, findings: Findings, decisions: Sequence[Decision]) -> None:
        names = [f.site.name for f in findings.found]
        unmatched = [g for g in self.policy.unmatched(names) if g != "*"]
        if unmatched and names:
            listed = ", ".join(repr(n) for n in names[:6]) + (", ..." if len(names) > 6 else "")
            raise PolicyError(
                f"no attention is named {', '.join(map(repr, unmatched))}", hint=f"the sites are {listed}"
            )
        if overruled := self.policy.overruled(names):
            listed = ", ".join(map(repr, overruled))
            self._warn(f"policy rules without effect: {listed}; later rules override them at every site")
        if not names:
            self._warn(
                f"no attention was found among {findings.candidates} candidates"
                + (
                    f", {len(findings.near_misses)} of them near misses; see report.near_misses"
                    if findings.near_misses
                    else ""
                )
            )
        elif not any(d.plan is not None for d in decisions):
            self._warn("the policy changes nothing: " + _why_nothing(decisions, self.options.limit))

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        warn(text)

    def _verify(self, checker: Checker, module: fx.GraphModule) -> float:
        error, found = checker.check(module)
        for text in found:
            self._warn(text)
        error = max(error, checker.error_on(module, self.batches, self._signature(module)))
        if self.options.tolerance is not None and not error <= self.options.tolerance:
            raise VerificationError(
                f"the rewritten model differs from the original by {error:.3g} (relative), "
                f"more than the tolerance {self.options.tolerance:g}",
                hint="choose a less aggressive policy, or fewer sites",
            )
        return error

    def _with_kept_mass(self, program: Program, decisions: list[Decision]) -> list[Decision]:
        """The attention recall of sites with blocks chosen at run time, as notes."""
        specs = {
            d.found.raised.node: replace(d.found.raised.spec, selection=d.site.spec.selection)
            for d in decisions
            if d.plan is not None and d.site.spec.selection is not None
        }
        if not specs:
            return decisions
        inputs = self._arranged(program) or [(program.args, program.kwargs)]
        values = [list(example_values(program.module, *given).values()) for given in inputs]
        if not all(values):
            return decisions
        data = "calibration data" if self.batches else "example inputs"
        found = measured(program.module, specs, values)
        return [
            replace(d, notes=(*d.notes, _kept(found[d.found.raised.node], data))) if d.found.raised.node in found else d
            for d in decisions
        ]

    def _signature(self, module: fx.GraphModule) -> Signature:
        return Signature.of(getattr(self.model, "forward", module.forward), self.args, self.kwargs)

    def _origin(
        self, program: Program, findings: Findings, decisions: Sequence[Decision], module: fx.GraphModule, error: float
    ) -> Origin:
        report = Report(
            sites=tuple(site_report(d) for d in decisions),
            near_misses=findings.near_misses,
            policy=self.policy.to_json(),
            error=error,
            seconds=dict(self.clock.seconds),
            warnings=tuple(self.warnings),
            versions=_versions(),
            fixed_axes=program.fixed_axes,
        )
        live = stored(module)
        sites = tuple(replace(d.site, parameters=live, refusals=d.refusals) for d in decisions)
        signature = self._signature(module)
        file = (
            FileOrigin(self.model, program.module, tuple(d.plan for d in decisions if d.plan is not None))
            if is_file(self.model)
            else None
        )
        return Origin(
            report,
            sites,
            signature,
            program.args,
            program.kwargs,
            program.shapes,
            trains_otherwise(self.model),
            program.form,
            file,
        )


def _kept(mass_H: Tensor, data: str) -> str:
    least = int(mass_H.argmin())
    return f"{mass_H.mean():.1%} attention recall on the {data}, lowest in head {least}: {mass_H[least]:.1%}"


def _check_axes(lost: set[tuple[str, int]]) -> None:
    if lost:
        listed = ", ".join(f"axis {axis} of {name}" for name, axis in sorted(lost))
        raise RewriteError(
            f"the rewritten graph is valid only at the size of the example for {listed}",
            hint="remove it from dynamic_shapes, find the site with limit=1, 2, ..., and report the model",
        )


def _raise_refusal(decisions: Sequence[Decision]) -> None:
    for d in decisions:
        for name, refusal in d.refusals.items():
            raise RewriteError(
                f"{name} refused {refusal}",
                site=d.found.site.name,
                hint=refusal.hint or "exclude the site from this pass",
            )


def _why_nothing(decisions: Sequence[Decision], limit: int | None) -> str:
    if limit == 0:
        return "limit=0"
    refused = [next(iter(d.refusals.items())) for d in decisions if d.refusals]
    if not refused:
        return "it assigns no pass to any site"
    (name, first), *_ = refused
    return f"{len(refused)} of {len(decisions)} sites refused, the first by {name} {first}"


def _versions() -> dict[str, str]:
    return {"attnopt": __version__, "torch": torch.__version__}
