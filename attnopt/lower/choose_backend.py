"""The backend of one attention: the cheapest that can compute it, and what the report says about the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnopt.ir import plugin_calls
from attnopt.ir.interfaces import Backend
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.lower.routing_time import faster, saved_by_rows


@dataclass(frozen=True)
class Choice:
    """``backend``: None if each refuses; ``reasons``: of those that do, by name."""

    backend: Backend | None
    reasons: Mapping[str, Refusal]
    notes: tuple[str, ...] = ()


def choose(backends: Sequence[Backend], before: Site, site: Site) -> Choice:
    """For ``site``, which was ``before`` in the model.  Where tokens are routed to heads, the form that skips the others
    is used if it is faster."""
    reasons = {b.name: r for b in backends if (r := plugin_calls.accepts(b, site)) is not None}
    able = [b for b in backends if b.name not in reasons]
    if not able:
        return Choice(None, reasons)
    backend, told = min(able, key=lambda b: plugin_calls.cost(b, site)), tuple[str, ...]()
    spec, more = site.spec, (site.spec.weight_gains, site.spec.extension)
    if spec.rows is not None:
        told = saved_by_rows(site, backend, able)
    elif spec.route is not None and all(x is None for x in more) and not spec.inputs and not spec.before:
        backend, told = faster(site, backend, backends)
    notes = (*told, *plugin_calls.notes(backend, site), *_masked(before, site, backend, backends))
    return Choice(backend, reasons, notes)


def _masked(before: Site, site: Site, chosen: Backend, backends: Sequence[Backend]) -> tuple[str, ...]:
    """A note if a pattern is only a mask, because the sequences are too short to gain from skipping."""
    if site.spec.pattern == before.spec.pattern or plugin_calls.skips(chosen, site):
        return ()
    better = [b.name for b in backends if b.skips and plugin_calls.accepts(b, site) is None]
    lengths = f"{site.q_len} queries and {site.kv_len} keys"
    return tuple(
        f"{chosen.name} computes all pairs under a mask, because {name} would be slower at {lengths}" for name in better
    )
