"""What a policy makes of a model's attentions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from attnopt.capture.program import Program
from attnopt.compiler.decide import Decision, decide, limited
from attnopt.compiler.followed_calibration import FollowedStream
from attnopt.compiler.head_budget import allot
from attnopt.compiler.job import Job
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.compiler.settle import Settled
from attnopt.compiler.tied_weights import jointly, of_all, tied
from attnopt.errors import PolicyError, RewriteError
from attnopt.ir.interfaces import Pass
from attnopt.match.find import Findings, Found


def plan(job: Job, program: Program, findings: Findings, policy: Settled) -> list[Decision]:
    """For each site, in the order of ``findings``, what is to be done to it.

    Raises PolicyError where the policy names sites that there are not, RewriteError for a refusal under ``strict``.
    """
    decided = _decided(job, program, findings.found, policy.passes)
    decisions = limited([_told(d, policy) for d in decided], job.options.limit)
    _check_names(job, findings)
    if job.options.strict:
        _raise_refusal(decisions)
    return decisions


def _told(d: Decision, policy: Settled) -> Decision:
    """With the alternatives of the policy that the site refused."""
    name = d.found.site.name
    over, refused = policy.passed_over.get(name, ()), policy.refusals.get(name, {})
    return replace(d, refusals={**refused, **d.refusals}, notes=(*d.notes, *(f"not taken: {o}" for o in over)))


def _decided(
    job: Job, program: Program, found: Sequence[Found], passes: Mapping[str, tuple[Pass, ...]]
) -> list[Decision]:
    """The result of the passes at each site; passes that use calibration data get the activations of the site."""
    decodes = job.options.decodes
    learning = [f for f in found if any(p.calibrates for p in passes[f.site.name])]
    if not learning or not job.batches:
        return [decide(f, passes[f.site.name], job.backends, decodes=decodes) for f in found]
    batches = job.arranged(program)
    invented = job.invented(program, batches, learning, (passes[f.site.name] for f in learning))
    shares = allot(program.module, learning, passes, job.backends, batches, invented, decodes, job.peers)
    made = dict(shares.ready)
    visited, followed = [f for f in learning if f.site.name not in made], None
    if job.peers is None and any(p.follows for f in learning for p in passes[f.site.name]):
        visited = [f for f in found if passes[f.site.name]]
        followed = FollowedStream(program.module, visited, batches, invented, job.backends)
    stream = followed or Stream(program.module, visited, batches, invented, job.peers)
    for group, activations in jointly(stream, tied(visited, passes)):
        name = group[0].site.name
        if name not in made:
            chosen = [shares.passes.get((name, p), p) for p in passes[name]]
            decisions = of_all(group, decide(group[0], chosen, job.backends, activations, decodes))
            made.update({d.found.site.name: d for d in decisions})
        if followed is not None and len(group) == 1:
            followed.follow(made[name])
    return [made.get(f.site.name) or decide(f, passes[f.site.name], job.backends, decodes=decodes) for f in found]


def _check_names(job: Job, findings: Findings) -> None:
    names = [f.site.name for f in findings.found]
    mentioned = [site for p in job.policy.passes for site in p.mentions if site not in names]
    unmatched = [*(g for g in job.policy.unmatched(names) if g != "*"), *mentioned]
    if unmatched and names:
        listed = ", ".join(repr(n) for n in names[:6]) + (", ..." if len(names) > 6 else "")
        raise PolicyError(f"no attention is named {', '.join(map(repr, unmatched))}", hint=f"the sites are {listed}")


def without_effect(job: Job, findings: Findings, policy: Settled, decisions: Sequence[Decision]) -> Iterator[str]:
    """Warnings of rules, or of a whole policy, that change nothing."""
    names = [f.site.name for f in findings.found]
    if overruled := job.policy.overruled(names, policy.chosen):
        listed = ", ".join(map(repr, overruled))
        yield f"policy rules without effect: {listed}; later rules override them at every site"
    if not names:
        hints = dict.fromkeys(m.refusal.hint for m in findings.near_misses)
        remedy = next(iter(hints)) if len(hints) == 1 else ""
        misses = f", {len(findings.near_misses)} of them near misses; {remedy or 'see report.near_misses'}"
        near = misses if findings.near_misses else ""
        yield f"no attention was found among {findings.candidates} candidates{near}"
    elif not any(d.plan is not None for d in decisions):
        yield "the policy changes nothing: " + _why_nothing(decisions, job.options.limit)


def _raise_refusal(decisions: Sequence[Decision]) -> None:
    for d in decisions:
        for name, refusal in d.refusals.items():
            raise RewriteError(
                f"{name} refused {replace(refusal, hint='')}",
                site=d.found.site.name,
                hint=refusal.hint or "change the options of this pass, or exclude the site from it",
            )


def _why_nothing(decisions: Sequence[Decision], limit: int | None) -> str:
    if limit == 0:
        return "limit=0"
    refused = [next(iter(d.refusals.items())) for d in decisions if d.refusals]
    if not refused:
        return "it assigns no pass to any site"
    (name, first), *_ = refused
    return f"{len(refused)} of {len(decisions)} sites refused, the first by {name} {first}"
