"""One attention on its way through passes, to a plan that a backend carries out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from attnopt.backends.reference import Reference
from attnopt.base.split_weight import split_like
from attnopt.ir import plugin_calls
from attnopt.ir.activations import Activations
from attnopt.ir.eviction import Eviction
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.interfaces import Backend, Pass, Rewrite, given_to
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.lower.choose_backend import choose
from attnopt.lower.lower import Plan
from attnopt.match.find import Found
from attnopt.match.token_path import TokenPath, error_of, is_equal


@dataclass(frozen=True)
class Rewriting:
    """``site``: as the passes so far leave it; the next one sees it so.  ``made``: what they changed together.

    ``decodes``: the result keeps the caches of its class, which can evict keys.
    """

    found: Found
    site: Site
    made: Rewrite
    decodes: bool = False
    passes: tuple[str, ...] = ()

    @classmethod
    def start(cls, found: Found, activations: Activations | None = None, decodes: bool = False) -> Rewriting:
        known = activations if found.site.spec.has_own_maps else None  # whose rows are tokens, seen by one head
        return cls(found, replace(found.site, activations=known), Rewrite(found.site.spec), decodes)

    def then(self, p: Pass) -> Rewriting | Refusal:
        """Rewritten by one more pass, or why it refuses."""
        if self.found.raised.region.escapes:
            return escapes(self.found)
        given = given_to(p, self.site)
        if (refusal := plugin_calls.check(p, given)) is not None:
            return refusal
        rewrite = plugin_calls.rewrite(p, given)
        if self.site.spec.extension is None and rewrite.spec.extension is not None:
            refusal = _other_tokens(self.found)
        if refusal is None and rewrite.spec.eviction is not None and not self.decodes:
            refusal = _no_cache(self.site, rewrite.spec.eviction)
        if refusal is not None:
            return refusal
        rewrite = replace(rewrite, notes=(*rewrite.notes, *_of_pruned(p, self.site)))
        made, site = self.made.then(rewrite), self.site.edited(rewrite)
        return replace(self, made=made, site=site, passes=(*self.passes, p.name))

    @property
    def result(self) -> Site:
        """The attention as it will be, with the weights that it has now."""
        return replace(self.site, parameters=self.found.site.parameters, activations=None)

    def planned(self, backends: Sequence[Backend]) -> Planned | Mapping[str, Refusal]:
        """How the cheapest backend carries it out, or why none does, by backend."""
        site = self.result
        choice = choose(backends, self.found.site, site)
        if choice.backend is None:
            return choice.reasons
        edits = tuple(_kept(e, self.found.site) for e in self.made.edits)
        plan = Plan(site.spec, edits, self.made.out_bias, found=self.found, backend=choice.backend, passes=self.passes)
        if plan.changes_nothing and choice.reasons and isinstance(choice.backend, Reference):
            return {**{name: _slower(site, name) for name in choice.slower}, **choice.reasons}
        return Planned(plan, (*self.made.notes, *choice.notes))


@dataclass(frozen=True)
class Planned:
    """A plan, and what passes and backend tell of it."""

    plan: Plan
    notes: tuple[str, ...]


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


def _slower(site: Site, backend: str) -> Refusal:
    """Why an attention keeps the plain operators that it has."""
    return site.refuse(
        "plain-is-faster",
        expected="lengths at which it is faster than plain operators",
        found=f"{site.q_len} queries and {site.kv_len} keys",
        hint=f'backend="{backend}" uses it all the same',
    )


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
    """Not in the double precision of the fit, in which the new weights of a whole model would need twice the memory; split as
    the weights whose places they take."""
    weight = site.projections[edit.role].weight
    assert weight is not None
    before = site.parameters[weight]
    dtype = torch.promote_types(before.dtype, torch.float32)
    return replace(
        edit, weight=split_like(edit.weight.to(dtype), before), bias=None if edit.bias is None else edit.bias.to(dtype)
    )
