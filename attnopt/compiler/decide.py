"""The decision for each site: a plan, or the reasons why it stays unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from attnopt.backends.reference import Reference
from attnopt.compiler import plugins
from attnopt.errors import PluginError
from attnopt.ir import plugin_calls
from attnopt.ir.activations import Activations
from attnopt.ir.eviction import Eviction
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.interfaces import Backend, Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.choose_backend import choose
from attnopt.lower.lower import Plan
from attnopt.match.find import Found
from attnopt.match.token_path import TokenPath, error_of, is_equal


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
    if found.raised.region.escapes and passes:
        return Decision(found, found.site, refusals={p.name: escapes(found) for p in passes})
    site, made, applied = replace(found.site, activations=activations), Rewrite(found.site.spec), list[str]()
    refusals: dict[str, Refusal] = {}
    for p in passes:
        refusal = plugin_calls.check(p, site)
        if refusal is not None:
            refusals[p.name] = refusal
            continue
        rewrite = plugin_calls.rewrite(p, site)
        if site.spec.extension is None and rewrite.spec.extension is not None:
            refusal = _other_tokens(found)
        if refusal is not None:
            refusals[p.name] = refusal
            continue
        if rewrite.spec.eviction is not None and not decodes:
            refusals[p.name] = _no_cache(site, rewrite.spec.eviction)
            continue
        rewrite = replace(rewrite, notes=(*rewrite.notes, *_of_pruned(p, site)))
        made, site = made.then(rewrite), site.edited(rewrite)
        applied.append(p.name)
    site = replace(site, parameters=found.site.parameters, activations=None)
    if not applied:
        return Decision(found, found.site, refusals=refusals)
    choice = choose(backends, found.site, site)
    if choice.backend is None:
        return Decision(found, found.site, refusals={**refusals, **choice.reasons})
    plan = Plan(
        site.spec,
        tuple(_kept(e, found.site) for e in made.edits),
        made.out_bias,
        found=found,
        backend=choice.backend,
        passes=tuple(applied),
    )
    if plan.changes_nothing and choice.reasons and isinstance(choice.backend, Reference):
        return Decision(found, found.site, refusals={**refusals, **choice.reasons})  # it already has plain operators
    notes = (*made.notes, *choice.notes, *_blind(found.site, site.spec), *_kept_whole(found.site, site.spec))
    return Decision(found, site, plan, refusals, notes)


def _other_tokens(found: Found) -> Refusal | None:
    """Refuse keys and values of other tokens that would not be those which the model computes of its own."""
    gm = found.raised.node.graph.owning_module
    assert isinstance(gm, fx.GraphModule)
    assert isinstance(found.path, TokenPath)
    error = error_of(gm, found.path)
    if is_equal(found.path, error):
        return None
    return found.site.refuse(
        "not-token-wise",
        expected="keys and values that are computed from each token alone, wherever it stands",
        found=f"a relative difference of {error:.2g}",
        hint="please report the model; exclude the site from the policy",
    )


def _of_pruned(p: Pass, site: Site) -> tuple[str, ...]:
    """A note if options name heads that earlier passes removed."""
    gone = list(map(str, plugin_calls.pruned_before(p, site)))
    if not gone:
        return ()
    listed = f"head {gone[0]} was" if len(gone) == 1 else f"heads {', '.join(gone)} were"
    return (f"{p.name}: {listed} pruned before, so that nothing of {'it' if len(gone) == 1 else 'them'} is changed",)


def _no_cache(site: Site, eviction: Eviction) -> Refusal:
    return site.refuse(
        "needs-cache",
        expected="a model that decodes from the cache of its class",
        found=f"a graph, for a {eviction}",
        hint='use attnopt.convert; or evict-keys(method="sinks"), which is a pattern',
    )


def _kept(edit: HeadWeights, site: Site) -> HeadWeights:
    """Not in the double precision of the fit: the new weights of a whole model would need twice the memory."""
    weight = site.projections[edit.role].weight
    assert weight is not None
    dtype = torch.promote_types(site.parameters[weight].dtype, torch.float32)
    return replace(edit, weight=edit.weight.to(dtype), bias=None if edit.bias is None else edit.bias.to(dtype))


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


def escapes(found: Found) -> Refusal:
    """Why a site whose inner values are used elsewhere stays unchanged."""
    nodes = found.raised.region.escapes
    users = [u for n in nodes for u in n.users if u not in found.raised.region.nodes]
    used_by = next((u.name for u in users if u.op != "output"), "the model's output")
    return found.site.refuse(
        "escapes",
        expected="scores and weights that are used only inside the attention",
        found=f"{nodes[0].name} used by {used_by}",
        hint="call the model so that it does not return attention weights",
    )


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
