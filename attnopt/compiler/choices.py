"""The passes that each attention may get under a policy that leaves choices open: what a search chooses from."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.capture.program import Program
from attnopt.compiler.job import Job
from attnopt.compiler.settle import rules_of_sites, walked
from attnopt.compiler.ways import Refused
from attnopt.ir.interfaces import Pass
from attnopt.match.find import Findings


@dataclass(frozen=True)
class SiteChoices:
    """``alternatives``: the passes that the site may get, distinct, at least one; ``()`` leaves it as it is.
    ``refused``: what the policy offers and the site does not accept."""

    site: str
    alternatives: tuple[tuple[Pass, ...], ...]
    refused: tuple[Refused, ...] = ()


def site_choices(job: Job, program: Program, findings: Findings) -> tuple[SiteChoices, ...]:
    """For each site, in the order in which they run, what ``job.policy`` lets it be; of the calibration data, if there is any.

    ``FirstOf`` is settled.  A pass without an alternative, and alternatives of which the site refuses each, do nothing where they
    are refused, as in ``optimize``.  Raises PolicyError, CalibrationError.
    """
    rules, _ = rules_of_sites(job, program, findings)
    made = {name: SiteChoices(name, (tuple(p for p in steps if isinstance(p, Pass)),)) for name, steps in rules.items()}
    for f, walk, ways in walked(job, program, findings, rules):
        distinct, refused = dict.fromkeys(way.passes for way in ways), dict.fromkeys((*walk.refused, *walk.passed_over))
        made[f.site.name] = SiteChoices(f.site.name, tuple(distinct), tuple(refused))
    return tuple(made.values())
