"""The backend of one attention: the cheapest that can compute it, and what the report says about the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attnopt.ir import plugin_calls
from attnopt.ir.interfaces import Backend
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.lower.routing_time import faster, saved_by_rows

_LONG = 1024  # tokens


@dataclass(frozen=True)
class Choice:
    """``backend``: None if each refuses; ``reasons``: of those that do, by name; ``slower``: those that could, too."""

    backend: Backend | None
    reasons: Mapping[str, Refusal]
    notes: tuple[str, ...] = ()
    slower: tuple[str, ...] = ()


def choose(backends: Sequence[Backend], before: Site, site: Site) -> Choice:
    """For ``site``, which was ``before`` in the model, at the lengths of the example, or at long ones where they may vary.
    Where tokens are routed to heads, the form that skips the others is used if it is faster."""
    reasons = {b.name: r for b in backends if (r := plugin_calls.accepts(b, site)) is not None}
    able = [b for b in backends if b.name not in reasons]
    if not able:
        return Choice(None, reasons)
    judged = _grown(site)
    backend, told = min(able, key=lambda b: plugin_calls.cost(b, judged)), tuple[str, ...]()
    spec, more = site.spec, (site.spec.weight_gains, site.spec.extension)
    if spec.rows is not None:
        told = saved_by_rows(site, backend, able)
    elif spec.route is not None and all(x is None for x in more) and not spec.inputs and not spec.before:
        backend, told = faster(site, backend, backends)
    notes = (*told, *plugin_calls.notes(backend, site), *_masked(before, judged, backend, backends))
    return Choice(backend, reasons, notes, tuple(b.name for b in able if b is not backend))


def _grown(site: Site) -> Site:
    """At a length that tells forms apart: an example of a few tokens says nothing of what a model is called with, and what a
    form loses at a short call is little."""
    if not site.is_dynamic or max(site.q_len, site.kv_len) >= _LONG:
        return site
    kv_len = site.kv_len + (-(-(_LONG - site.kv_len) // site.kv_step) * site.kv_step if site.kv_step else 0)
    grows = site.q_len == site.kv_len or not site.kv_step
    return replace(site, q_len=max(kv_len, _LONG) if grows else site.q_len, kv_len=kv_len)


def _masked(before: Site, site: Site, chosen: Backend, backends: Sequence[Backend]) -> tuple[str, ...]:
    """A note if a pattern is only a mask, because the sequences are too short to gain from skipping."""
    if site.spec.pattern == before.spec.pattern or plugin_calls.skips(chosen, site):
        return ()
    better = [b.name for b in backends if b.skips and plugin_calls.accepts(b, site) is None]
    lengths = f"{site.q_len} queries and {site.kv_len} keys"
    return tuple(
        f"{chosen.name} computes all pairs under a mask, because {name} would be slower at {lengths}" for name in better
    )
