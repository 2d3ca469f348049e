"""One budget of heads for all sites: it is spent where the model's output depends most on them.

What the layer at a site loses with n heads is known from its own least squares; what the model's output makes of such a
loss is measured once for each site, by running the model with that site alone rewritten.  The sum is minimised exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.calibration import Inputs
from attnopt.compare import tensors
from attnopt.deciding import Decision, decide
from attnopt.errors import CalibrationError
from attnopt.finding import Found
from attnopt.lowering import lower
from attnopt.policy import Policy
from attnopt.rewriting import Backend, Pass, SharesBudget
from attnopt.site import Site
from attnopt.streaming import Stream

MEASURED = 4  # batches, spread over the calibration data, on which a site's influence is measured


@dataclass(frozen=True)
class Allotment:
    """``passes``: (site, the pass as the policy has it) -> the pass with the site's share; ``ready``: by the site's name
    the decision, where it came up on the way."""

    passes: Mapping[tuple[str, Pass], Pass]
    ready: Mapping[str, Decision]


@dataclass(frozen=True)
class _Shares:
    """What one site can lose: the layer's error for each number of heads, and the site rewritten at one of these."""

    site: Site
    errors: Mapping[int, float]
    passes: Mapping[int, Pass]
    probed: int
    probe: Decision


def allot(
    gm: fx.GraphModule, found: Sequence[Found], policy: Policy, backends: Sequence[Backend], batches: Sequence[Inputs]
) -> Allotment:
    """Each site's share of every pass of the policy whose budget is one for all sites."""
    made: dict[tuple[str, Pass], Pass] = {}
    ready: dict[str, Decision] = {}
    shared = {p for f in found for p in policy.passes_for(f.site.name) if isinstance(p, SharesBudget) and p.is_shared}
    for p in sorted(shared, key=repr):
        for name, (share, probe) in _allot_one(gm, found, policy, backends, batches, p).items():
            made[name, p] = share
            if probe is not None and policy.passes_for(name)[-1] == p and len(shared) == 1:
                ready[name] = probe
    return Allotment(made, ready)


def _allot_one(
    gm: fx.GraphModule, found: Sequence[Found], policy: Policy, backends: Sequence[Backend], batches: Sequence[Inputs],
    p: Pass,
) -> dict[str, tuple[Pass, Decision | None]]:  # fmt: skip
    """By the site's name the pass with its share, and what it makes of the site if that is known already."""
    assert isinstance(p, SharesBudget)
    shares: dict[str, _Shares] = {}
    with_it = [f for f in found if p in policy.passes_for(f.site.name) and not f.raised.region.escapes]
    for f, activations in Stream(gm, with_it, batches).sites():
        passes = policy.passes_for(f.site.name)
        before = decide(f, passes[: passes.index(p)], backends, activations)
        site = before.seen(activations)
        if p.check(site) is not None:
            continue
        offered, wanted = p.shares(site), p.total([site])
        if not offered:
            continue
        probed = min((n for n in offered if n < max(offered)), key=lambda n: abs(n - wanted), default=max(offered))
        probe = decide(f, (*passes[: passes.index(p)], offered[probed].rewrite), backends, activations)
        errors = {n: o.error for n, o in offered.items()}
        rewrites = {n: o.rewrite for n, o in offered.items()}
        shares[f.site.name] = _Shares(site.without_activations(), errors, rewrites, probed, probe)
    if not shares:
        return {}
    influence = _influences(gm, list(shares.values()), batches)
    curves = [{n: w * e for n, e in s.errors.items()} for w, s in zip(influence, shares.values(), strict=True)]
    counts = _spend(curves, p.total([s.site for s in shares.values()]))
    chosen = zip(shares.items(), counts, strict=True)
    return {name: (s.passes[n], s.probe if n == s.probed else None) for (name, s), n in chosen}


def _influences(gm: fx.GraphModule, shares: Sequence[_Shares], batches: Sequence[Inputs]) -> list[float]:
    """For each site the model's error over the layer's error, where that site alone is rewritten."""
    some = batches[:: max(1, len(batches) // MEASURED)][:MEASURED]
    original = [_outputs(gm, batch) for batch in some]
    found: list[float] = []
    for share in shares:
        if share.probe.plan is None or share.errors[share.probed] <= 0:
            found.append(0.0)
            continue
        module = lower(gm, [share.probe.plan])
        wrong = sum(_apart(_outputs(module, batch), want) for batch, want in zip(some, original, strict=True))
        if not math.isfinite(wrong):
            raise CalibrationError(
                "the model's output is not finite on the calibration data",
                site=share.site.name,
                hint='leave such batches out, or give each site its own budget with budget="site"',
            )
        found.append(wrong / share.errors[share.probed])
    return found


def _outputs(module: fx.GraphModule, batch: Inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t.double() for t in tensors(module(*batch[0], **batch[1])) if t.is_floating_point()]


def _apart(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Squared difference, relative to what there was."""
    return sum(
        float((g - w).square().sum() / w.square().sum().clamp(min=1e-300)) for g, w in zip(got, want, strict=True)
    )


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
        raise CalibrationError(f"{budget} heads are too few for {len(curves)} sites", hint="allow at least one each")
    return min(best.values())[1]
