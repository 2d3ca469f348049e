"""What a policy says of the attentions of one model: the passes of each, without conditions and alternatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from attnopt.capture.program import Program
from attnopt.compiler.job import Job
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.compiler.measure_sites import measured
from attnopt.compiler.policy import Chosen
from attnopt.compiler.policy_text import Steps, passes_in
from attnopt.compiler.rewriting import Rewriting
from attnopt.compiler.ways import Refused, Walk, Way
from attnopt.errors import CalibrationError
from attnopt.ir.interfaces import Pass
from attnopt.ir.refusal import Refusal
from attnopt.match.find import Findings, Found

Rules = Mapping[str, Steps]  # by site


@dataclass(frozen=True)
class Settled:
    """By the name of the site: its ``passes``; ``passed_over``: the alternatives that it refused before it accepted one;
    ``refusals``: of alternatives of which it accepts none.  ``chosen``: which sites meet each condition."""

    passes: Mapping[str, tuple[Pass, ...]]
    chosen: Chosen = field(default_factory=dict)
    passed_over: Mapping[str, tuple[Refused, ...]] = field(default_factory=dict)
    refusals: Mapping[str, Mapping[str, Refusal]] = field(default_factory=dict)


def settled(job: Job, program: Program, findings: Findings) -> Settled:
    """Raises PolicyError for a choice, and for a condition that no site meets; CalibrationError."""
    job.policy.without_choices()
    rules, chosen = rules_of_sites(job, program, findings)
    passes = {name: tuple(step for step in steps if isinstance(step, Pass)) for name, steps in rules.items()}
    over, refusals = dict[str, tuple[Refused, ...]](), dict[str, dict[str, Refusal]]()
    for f, walk, ways in walked(job, program, findings, rules):
        name = f.site.name
        passes[name] = ways[0].passes
        over[name] = tuple(walk.passed_over)
        refusals[name] = {r.by: r.refusal for r in walk.refused}
    return Settled(passes, chosen, over, refusals)


def rules_of_sites(job: Job, program: Program, findings: Findings) -> tuple[Rules, Chosen]:
    """The passes and alternatives of each site in the order in which they run, and which sites meet each condition."""
    sites, conditions = [f.site for f in findings.found], job.policy.conditions
    chosen: Chosen = {}
    if conditions:
        measures = any(where.measures for where in conditions)
        if measures and job.peers is not None:
            raise CalibrationError(
                "conditions that measure heads need all calibration data in one process, and several processes share it",
                hint="name the sites instead, or pass all batches to each process as plain calibration",
            )
        batches = job.arranged(program) if measures else ()
        scores = measured(conditions, program, findings.found, batches, job.options.seed)
        chosen = {where: where.among(sites, scores) for where in conditions}
    return {site.name: job.policy.passes_for(site.name, chosen) for site in sites}, chosen


def walked(job: Job, program: Program, findings: Findings, rules: Rules) -> Iterator[tuple[Found, Walk, list[Way]]]:
    """Every site whose rule has alternatives, with the ways through these; those that read calibration data come last."""
    many = [f for f in findings.found if not all(isinstance(step, Pass) for step in rules[f.site.name])]
    learning = [f for f in many if any(p.calibrates for p in passes_in(rules[f.site.name]))]
    batches = job.arranged(program) if learning else ()
    plain = [f for f in many if not batches or all(f is not other for other in learning)]
    taught = Stream(program.module, learning, batches, peers=job.peers).sites() if batches else iter(())
    for f, activations in chain(((f, None) for f in plain), taught):
        walk = Walk(job.backends)
        start = Way(Rewriting.start(f, activations, job.options.decodes))
        yield f, walk, walk.through(rules[f.site.name], start)
