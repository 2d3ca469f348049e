"""The decision for each site: a plan, or the reasons why it stays unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnopt.base.split_weight import keeping_whole
from attnopt.compiler import plugins
from attnopt.compiler.rewriting import Planned, Rewriting, escapes
from attnopt.errors import PluginError
from attnopt.ir import plugin_calls
from attnopt.ir.activations import Activations
from attnopt.ir.interfaces import Backend, Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.lower import Plan
from attnopt.match.find import Found


@dataclass(frozen=True)
class Decision:
    """``site`` is the attention as it will be, with the weights that it has now; ``plan``, where the new ones are, is None
    where nothing is to be done."""

    found: Found
    site: Site
    plan: Plan | None = None
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def seen(self, activations: Activations) -> Site:
        """The site as the next pass sees it."""
        site = replace(self.site, activations=activations)
        return site if self.plan is None else site.edited(self.plan)


@keeping_whole()
def decide(
    found: Found,
    passes: Sequence[Pass],
    backends: Sequence[Backend],
    activations: Activations | None = None,
    decodes: bool = False,
) -> Decision:
    """Run the passes one after the other; each sees what the ones before it made.

    ``decodes``: the result keeps the caches of its class, which can evict keys.
    """
    return _through(Decision(found, found.site), Rewriting.start(found, activations, decodes), passes, backends)


def decided_further(
    d: Decision, passes: Sequence[Pass], backends: Sequence[Backend], activations: Activations, decodes: bool = False
) -> Decision:
    """With these passes after those that made ``d``."""
    now = Rewriting.start(d.found, activations, decodes)
    if d.plan is not None:
        made = Rewrite(d.plan.spec, d.plan.edits, d.plan.out_bias, d.notes)
        now = replace(now, site=now.site.edited(d.plan), made=made, passes=d.plan.passes)
    return _through(d, now, passes, backends)


def _through(d: Decision, now: Rewriting, passes: Sequence[Pass], backends: Sequence[Backend]) -> Decision:
    """The decision after these passes; where no backend computes what they make, ``d`` stands."""
    found, refusals, before = d.found, dict(d.refusals), now
    for p in passes:
        after = now.then(p)
        if isinstance(after, Refusal):
            refusals[p.name] = after
        else:
            now = after
    if now is before:
        return replace(d, refusals=refusals)
    made = now.planned(backends)
    if not isinstance(made, Planned):
        return replace(d, refusals={**refusals, **made})
    site = now.result
    notes = dict.fromkeys((*made.notes, *_blind(found.site, site.spec), *_kept_whole(found.site, site.spec)))
    return Decision(found, site, made.plan, refusals, tuple(notes))


def limited(decisions: Sequence[Decision], limit: int | None) -> list[Decision]:
    """Only the first ``limit`` rewrites."""
    if limit is None:
        return list(decisions)
    kept: list[Decision] = []
    for d in decisions:
        if d.plan is not None and limit <= sum(k.plan is not None for k in kept):
            d = Decision(d.found, d.found.site, notes=(f"skipped because of limit={limit}",))
        kept.append(d)
    return kept


def standing_answers(found: Found) -> dict[str, Refusal | None]:
    """Applicability: the answer of each checked pass for this site, where it does not depend on its options."""
    if found.raised.region.escapes:
        return dict.fromkeys(plugins.passes(), escapes(found))
    return {name: _asked(name, found.site) for name in plugins.passes() if plugins.typical_pass(name) is not None}


def standing_refusals(found: Found) -> dict[str, Refusal]:
    """The passes that do not apply to this site, regardless of their options."""
    return {name: refusal for name, refusal in standing_answers(found).items() if refusal is not None}


def _asked(name: str, site: Site) -> Refusal | None:
    typical = plugins.typical_pass(name)
    assert typical is not None
    try:
        return plugin_calls.check(typical, site)
    except PluginError as e:
        return plugin_calls.no_answer(site, e)


def _blind(site: Site, spec: AttentionSpec) -> tuple[str, ...]:
    """A note about fully masked queries of a pattern."""
    if spec.pattern == site.spec.pattern:
        return ()
    counts = spec.visible_pattern.blind(site.q_len, site.kv_len, num_heads=spec.num_heads)
    return tuple(
        f"{count} of {site.q_len} queries are fully masked{_of_heads(spec, counts, count)}: their output is zero"
        for count in sorted({*counts} - {0})
    )


def _of_heads(spec: AttentionSpec, counts: tuple[int, ...], count: int) -> str:
    places = [place for place, own in enumerate(counts) if own == count]
    if len(places) == len(counts):
        return ""
    return f" in head{'s' if len(places) > 1 else ''} {', '.join(str(spec.heads[place]) for place in places)}"


def _kept_whole(site: Site, spec: AttentionSpec) -> tuple[str, ...]:
    """A note if heads were removed but their weights could not be."""
    if spec.num_heads == site.num_heads and spec.num_kv_heads == site.num_kv_heads:
        return ()
    return tuple(
        f"the {role} weights were not reduced: {p.why}" for role, p in site.projections.items() if p.rows is None
    )
