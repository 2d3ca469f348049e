"""Budget allocation: one head budget for all sites, spent where the model output is most sensitive.

Sites with shared weights (calls of one module) count as one site here.

The loss of a layer with n heads is known from its own least squares; how strongly the model output depends on such a
loss is measured once per site, by running the model with only that site rewritten.  The sum is minimized exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import squared_difference
from attnopt.base.split_weight import has_split, keeping_whole
from attnopt.capture.run_unchanged import outputs_of
from attnopt.compiler.decide import Decision, decide
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.compiler.tied_weights import jointly, of_all, tied
from attnopt.errors import CalibrationError
from attnopt.ir.interfaces import Backend, Pass, SharesBudget, given_to
from attnopt.ir.peers import Peers
from attnopt.ir.site import Site
from attnopt.lower.lower import lower
from attnopt.match.find import Found

Passes = Mapping[str, tuple[Pass, ...]]  # by site
MEASURED = 4  # batches, spread over the calibration data, on which a site's influence is measured


@dataclass(frozen=True)
class Allotment:
    """``passes``: (site, the pass of the policy) -> the pass with the allocation of the site; ``ready``: by site name
    the decision, if it was already computed."""

    passes: Mapping[tuple[str, Pass], Pass]
    ready: Mapping[str, Decision]


@dataclass(frozen=True)
class _Shares:
    """What one site can lose: the layer's error for each number of heads, and the site rewritten at one of these."""

    site: Site
    errors: Mapping[int, float]
    passes: Mapping[int, Pass]
    probed: int
    probe: Sequence[Decision]  # one for each call of the site's weights


def allot(
    gm: fx.GraphModule,
    found: Sequence[Found],
    passes: Passes,
    backends: Sequence[Backend],
    batches: Sequence[CallInputs],
    invented: Sequence[CallInputs] = (),
    decodes: bool = False,
    peers: Peers | None = None,
) -> Allotment:
    """The allocation of each site for every one of its passes with a shared budget.  ``peers``: who have other batches."""
    made: dict[tuple[str, Pass], Pass] = {}
    ready: dict[str, Decision] = {}
    shared = {p for f in found for p in passes[f.site.name] if isinstance(p, SharesBudget) and p.is_shared}
    for p in sorted(shared, key=repr):
        for s, n in _allot_one(gm, found, passes, backends, batches, invented, p, decodes, peers):
            for d in s.probe:
                name = d.found.site.name
                made[name, p] = s.passes[n]
                if n == s.probed and passes[name][-1] == p and len(shared) == 1:
                    ready[name] = d
    return Allotment(made, ready)


def _allot_one(
    gm: fx.GraphModule, found: Sequence[Found], passes: Passes, backends: Sequence[Backend], batches: Sequence[CallInputs],
    invented: Sequence[CallInputs], p: Pass, decodes: bool, peers: Peers | None,
) -> list[tuple[_Shares, int]]:  # fmt: skip
    """What each set of weights can have, and how many heads it gets."""
    assert isinstance(p, SharesBudget)
    shares: list[_Shares] = []
    with_it = [f for f in found if p in passes[f.site.name] and not f.raised.region.escapes]
    groups = tied(with_it, passes)
    for group, activations in jointly(Stream(gm, with_it, batches, invented, peers), groups):
        f = group[0]
        earlier = passes[f.site.name][: passes[f.site.name].index(p)]
        before = decide(f, earlier, backends, activations, decodes)
        with keeping_whole():
            site = given_to(p, before.seen(activations))
            if p.check(site) is not None:
                continue
            offered, wanted = p.shares(site), p.total([site])
        if not offered:
            continue
        probed = min((n for n in offered if n < max(offered)), key=lambda n: abs(n - wanted), default=max(offered))
        probe = decide(f, (*earlier, offered[probed].rewrite), backends, activations, decodes)
        errors = {n: o.error for n, o in offered.items()}
        rewrites = {n: o.rewrite for n, o in offered.items()}
        shares.append(_Shares(site.without_activations(), errors, rewrites, probed, of_all(group, probe)))
    if not shares:
        return []
    influence = _influences(gm, shares, batches, peers)
    curves = [{n: w * e for n, e in s.errors.items()} for w, s in zip(influence, shares, strict=True)]
    counts = _spend(curves, p.total([s.site for s in shares]))
    return list(zip(shares, counts, strict=True))


def _influences(
    gm: fx.GraphModule, shares: Sequence[_Shares], batches: Sequence[CallInputs], peers: Peers | None
) -> list[float]:
    """For each site, the ratio of model error to layer error with only that site rewritten."""
    first, total = (0, len(batches)) if peers is None else peers.places(len(batches))
    chosen = range(total)[:: max(1, total // MEASURED)][:MEASURED]
    some = [batch for place, batch in enumerate(batches, first) if place in chosen]
    beside = _in_company(gm, batches, len(some), peers)
    original = [outputs_of(gm, batch) for batch in (*some, *beside)]
    found: list[float] = []
    for share in shares:
        plans = [d.plan for d in share.probe if d.plan is not None]
        if not plans or share.errors[share.probed] <= 0:
            found.append(0.0)
            continue
        module = lower(gm, plans)
        runs = zip((*some, *beside), original, strict=True)
        apart = [squared_difference(outputs_of(module, batch), want) for batch, want in runs]
        wrong = sum(apart[: len(some)])
        wrong = wrong if peers is None else sum(peers.everyone(wrong))
        if not math.isfinite(wrong):
            raise CalibrationError(
                "the model output is not finite on the calibration data",
                site=share.site.name,
                hint='remove such batches, or use a budget per site with budget="site"',
            )
        found.append(wrong / share.errors[share.probed])
    return found


def _in_company(
    gm: fx.GraphModule, batches: Sequence[CallInputs], count: int, peers: Peers | None
) -> Sequence[CallInputs]:
    """What this process runs beside its ``count`` batches, for nothing: where weights are split, all have to run as often."""
    if peers is None or not has_split(gm):
        return ()
    return [batches[0]] * (max(peers.everyone(count)) - count)


def _spend(curves: Sequence[Mapping[int, float]], budget: int) -> list[int]:
    """For each curve the number of heads, together at most ``budget``, for which the sum of the curves is least."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for curve in curves:
        longer: dict[int, tuple[float, list[int]]] = {}
        for spent, (cost, counts) in best.items():
            for n, more in curve.items():
                total = spent + n
                if total <= budget and cost + more < longer.get(total, (math.inf, []))[0]:
                    longer[total] = (cost + more, [*counts, n])
        best = longer
    if not best:
        raise CalibrationError(
            f"{budget} heads are too few for {len(curves)} sites", hint="allow at least one head per site"
        )
    return min(best.values())[1]
