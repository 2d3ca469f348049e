"""What a policy leaves open: for each attention, the passes that it may get."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.capture.program import Program
from attnopt.compiler.job import Job
from attnopt.ir.interfaces import Pass
from attnopt.match.find import Findings


@dataclass(frozen=True)
class SiteChoices:
    """The alternatives of one attention, all different; an empty one leaves it as it is."""

    site: str
    alternatives: tuple[tuple[Pass, ...], ...]


def site_choices(job: Job, program: Program, findings: Findings) -> tuple[SiteChoices, ...]:
    """For each attention what ``job.policy`` lets it be."""
    return tuple(SiteChoices(f.site.name, (job.policy.passes_for(f.site.name),)) for f in findings.found)
