"""The data of the report page, computed before the template: drawings, lanes, bars, and the policy that undoes a rewrite."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from attnopt.errors import AttnoptError
from attnopt.ir.cost import Cost
from attnopt.patterns import Pattern, parse
from attnopt.render.pattern_cells import Picture, pictures
from attnopt.report.report import Form, Report, SiteReport

PITCH = 16  # of the squares in a drawing of heads
SMALLEST, LARGEST = -9, 0  # decades of the error scale


@dataclass(frozen=True)
class Head:
    """A square in a drawing of heads; ``x`` is its left edge, ``reads`` the left edge of its K/V head."""

    number: int
    x: int
    kept: bool
    reads: int | None = None


@dataclass(frozen=True)
class SiteView:
    """A site with its drawings."""

    number: int
    site: SiteReport
    policy: Mapping[str, object]

    @property
    def anchor(self) -> str:
        return f"site-{self.number}"

    @property
    def name(self) -> str:
        return self.site.name or "(root)"

    @property
    def label(self) -> str:
        """The distinguishing part within its lane: the numbers in its name, otherwise its last word."""
        numbers = re.findall(r"\d+", self.site.name)
        return ".".join(numbers) if numbers else self.name.rpartition(".")[2]

    @property
    def lane(self) -> str:
        """The name with a star for each number: the same for each layer of a stack."""
        return re.sub(r"\d+", "*", self.name)

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        before, after = self.site.form_before, self.site.form_after
        if before is None or after is None:
            return ()
        return pictures(
            after.pattern, self.site.q_len, self.site.kv_len, len(after.heads), _pattern_of(before, after.heads)
        )

    def heads_at(self, picture: Picture) -> tuple[int, ...]:
        """The numbers, in the trained model, of the heads that a picture is of."""
        after = self.site.form_after
        return () if after is None else tuple(after.heads[place] for place in picture.places)

    @property
    def heads(self) -> tuple[Head, ...]:
        before, after = self.site.form_before, self.site.form_after
        if before is None or after is None:
            return ()
        reads = dict(zip(after.heads, after.kv_of_head, strict=True))
        at = self._kv_places
        return tuple(
            Head(h, i * PITCH, h in reads, at[reads[h]] if h in reads else None) for i, h in enumerate(before.heads)
        )

    @property
    def kv_heads(self) -> tuple[Head, ...]:
        """The shared K/V heads, or none if each head has its own."""
        after, at = self.site.form_after, self._kv_places
        if after is None or len(at) == len(after.heads):
            return ()
        return tuple(Head(g, x, True) for g, x in at.items())

    @property
    def _kv_places(self) -> dict[int, int]:
        """Where each K/V head is drawn: evenly below the query heads."""
        before, after = self.site.form_before, self.site.form_after
        if before is None or after is None:
            return {}
        used = sorted(set(after.kv_of_head))
        return {g: round(((i + 0.5) * len(before.heads) / len(used) - 0.5) * PITCH) for i, g in enumerate(used)}

    @property
    def decade(self) -> float | None:
        """Position of the error on the logarithmic scale, in percent; None if not measured."""
        return None if self.site.error is None else _on_scale(self.site.error)

    @property
    def heat(self) -> tuple[tuple[int, float, float, bool], ...]:
        """For each head its number, its importance, that relative to the site's most important head, and whether it stays."""
        scores, before, after = self.site.importance, self.site.form_before, self.site.form_after
        if scores is None or before is None:
            return ()
        largest = max(map(abs, scores), default=0.0) or 1.0
        kept = set(before.heads if after is None else after.heads)
        return tuple((h, s, max(0.0, s / largest), h in kept) for h, s in zip(before.heads, scores, strict=False))

    @property
    def undone(self) -> str:
        """The policy that leaves this site unchanged: a rule with the exact site name takes precedence."""
        return policy_text({**self.policy, self.site.name: []})


def site_views(report: Report) -> list[SiteView]:
    return [SiteView(i, site, report.policy) for i, site in enumerate(report.sites)]


def lanes(views: Sequence[SiteView]) -> dict[str, list[SiteView]]:
    """The sites by lane, ordered by the first site of each lane."""
    found: dict[str, list[SiteView]] = {}
    for view in views:
        found.setdefault(view.lane, []).append(view)
    return found


@dataclass(frozen=True)
class Measure:
    """A cost before and after, with ``unit`` "" for a plain count."""

    name: str
    before: float
    after: float
    unit: str = ""

    @property
    def share(self) -> float:
        """After as a percentage of before."""
        return 100 * self.after / self.before if self.before else 100.0


def measures(report: Report) -> list[Measure]:
    found = _of_cost(report.cost_before, report.cost_after)
    if {"before", "after"} <= report.cpu_seconds.keys():
        seconds = report.cpu_seconds
        found.append(Measure("CPU time per call, measured", seconds["before"], seconds["after"], "s"))
    return found


def _of_cost(before: Cost, after: Cost) -> list[Measure]:
    return [
        Measure("FLOPs per call", before.flops, after.flops),
        Measure("Parameters", before.parameters, after.parameters),
        Measure("K/V bytes per token", before.kv_bytes_per_token, after.kv_bytes_per_token),
    ]


def policy_text(policy: Mapping[str, object]) -> str:
    """A policy as the JSON file that ``optimize`` reads, a rule a line."""
    rules = [f"  {json.dumps(glob)}: {json.dumps(passes, ensure_ascii=False)}" for glob, passes in policy.items()]
    return "{\n" + ",\n".join(rules) + "\n}" if rules else "{}"


def _pattern_of(form: Form, heads: Sequence[int]) -> Pattern | None:
    """The pattern of a form for only these heads, for comparison with a later one."""
    place = {h: i for i, h in enumerate(form.heads)}
    try:
        return parse(form.pattern).for_heads([place[h] for h in heads if h in place])
    except AttnoptError:
        return None


def _on_scale(error: float) -> float:
    if not error > 0:
        return 0.0
    decade = LARGEST if math.isinf(error) else min(LARGEST, max(SMALLEST, math.log10(error)))
    return 100 * (decade - SMALLEST) / (LARGEST - SMALLEST)
