"""Share key/value heads between query heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.options import choice, whole
from attnopt.errors import PolicyError
from attnopt.fit.absorbable_maps import edit, mixes_values, mixing_of_scores
from attnopt.fit.compensation import refitted
from attnopt.fit.kv_merge import Merged, Side, keys_of, values_of
from attnopt.fit.kv_partition import Group, adjacent, agglomerated, optimal, queries_by_norm
from attnopt.fit.kv_pooling import KV_MERGES, Mean, merged
from attnopt.fit.least_squares import out_edits, output_weights, require_tokens
from attnopt.fit.shared_values import better_values
from attnopt.ir.head_routing import Routed
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.interfaces import Pass, Rewrite, Share, SharesBudget
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.heads import BUDGETS, expected_projections, refuse_edits, refuse_unknown_projections

GROUPINGS = ("adjacent", "similarity", "key-norm", "optimal")
SEARCHED = ("similarity", "optimal")  # groupings that use activations
ALIGNED = ("procrustes", "svd", "score-optimal")
COMPENSATIONS = ("none", "least-squares")


@dataclass(frozen=True)
class GroupedQuery(Pass, SharesBudget):
    """Merge key/value heads down to ``kv_heads`` (GQA, arXiv:2305.13245); a group keeps the number of its first head.

    ``grouping``: which heads are merged: ``"adjacent"`` runs; ``"similarity"``: heads with the most similar keys and
    values, joined pair by pair; ``"key-norm"``: adjacent heads, with more queries for larger keys (KDGQA,
    arXiv:2408.08454); ``"optimal"``: the partition with the least loss; or the group number of each current head.
    ``merge``: ``"mean"`` or ``"first"`` of the weights in the group, or the name of a registered ``KvMerge``;
    ``"procrustes"``: the mean after aligning each head with the first (arXiv:2412.20677); ``"svd"``: the subspace with
    most of the energy of the keys, and of the values; ``"score-optimal"``: the subspace that best preserves the scores
    and the layer output.  The last three fold the change of basis into the query and output projections; with rotary
    positions they act on each frequency separately.
    ``compensate``: ``"none"``, or ``"least-squares"``: fit shared values and the output projection to the original
    layer output.
    ``budget``: ``kv_heads`` at each site (``"site"``), or on average (``"global"``), with more where the model output
    is more sensitive.

    Defaults: with calibration data, optimal, score-optimal, least squares and a global budget, if the projections of
    the site allow it; otherwise adjacent and mean.  Raises PolicyError.
    """

    name: ClassVar[str] = "grouped-query"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    kv_heads: int
    merge: str | None = None
    grouping: str | Sequence[int] | None = None
    compensate: str | None = None
    budget: str | None = None

    def __post_init__(self) -> None:
        whole(self.name, "kv_heads", self.kv_heads, least=1)
        if self.merge is not None:
            self._checked_merge(self.merge)
        if isinstance(self.grouping, str):
            choice(self.name, "grouping", self.grouping, GROUPINGS)
        elif self.grouping is not None:
            object.__setattr__(self, "grouping", self._checked(self.grouping))
        if self.compensate is not None:
            choice(self.name, "compensate", self.compensate, COMPENSATIONS)
        if self.budget is not None:
            choice(self.name, "budget", self.budget, BUDGETS)
        if self.grouping == "key-norm" and self.merge in ALIGNED:
            raise PolicyError(
                f"grouped-query: invalid value merge={self.merge!r} with grouping='key-norm', which changes the "
                "head that a query reads: expected merge='mean'"
            )

    def _checked_merge(self, merge: str) -> None:
        known = (*KV_MERGES.listed(), *ALIGNED)
        if choice(self.name, "merge", merge, known) not in ALIGNED:
            KV_MERGES.load(merge)

    def _checked(self, grouping: Any) -> tuple[int, ...]:
        """The group number of each head: 0 to kv_heads - 1, each of them used."""
        if not isinstance(grouping, (list, tuple)):
            raise PolicyError(
                f"grouped-query: invalid value grouping={grouping!r}: expected one of {GROUPINGS} or numbers"
            )
        numbers = tuple(whole(self.name, "grouping", g) for g in grouping)
        if len(set(numbers)) != self.kv_heads or max(numbers) >= self.kv_heads:
            raise PolicyError(
                f"grouped-query: invalid value grouping={grouping!r}: expected one group per head, "
                f"numbered 0 to {self.kv_heads - 1}, with every group used"
            )
        return numbers

    # ------------------------------------------------------------ a budget for all sites
    @property
    def is_shared(self) -> bool:
        return self.budget == "global" or (self.budget is None and self.grouping is None)

    def total(self, sites: Sequence[Site]) -> int:
        return sum(min(self.kv_heads, site.num_kv_heads) for site in sites)

    def shares(self, site: Site) -> Mapping[int, Share]:
        heads = site.num_kv_heads
        if self._merge(site) not in ALIGNED:
            return {min(self.kv_heads, heads): Share(0.0, replace(self, budget="site"))}
        sides = self._sides(site)
        found: dict[int, Share] = {}
        for count, groups in self._partitions(site, sides, range(1, heads + 1)).items():
            numbers = tuple(next(n for n, g in enumerate(groups) if h in g) for h in range(heads))
            lost = sum(float(side.loss([g])[0]) for side in sides for g in groups)
            error = lost * lost  # fitting repairs small losses: the remaining loss grows with the square
            found[count] = Share(error, replace(self, kv_heads=count, grouping=numbers, budget="site"))
        return found

    # ------------------------------------------------------------ one site
    @classmethod
    def typical(cls) -> GroupedQuery:
        return cls(kv_heads=1)

    def check(self, site: Site) -> Refusal | None:
        if self.kv_heads == site.num_kv_heads:
            return None
        edited = [e for e in site.spec.after if isinstance(e, Routed) or not e.fits_other_values]
        refused = refuse_edits(site, edits=edited, hint="apply grouped-query before heads are routed or replaced")
        refused = refused or self._refuse_sizes(site) or self._refuse_data(site)
        roles = ("q", "k", "v", "out") if self.merge in ALIGNED else ("k", "v")
        return refused or refuse_unknown_projections(site, roles, expected_projections(roles), "")

    def rewrite(self, site: Site) -> Rewrite:
        if self.kv_heads == site.num_kv_heads:
            return Rewrite(site.spec)
        merge = self._merge(site)
        if merge not in ALIGNED:
            return self._pooled(site, merge)
        sides = self._sides(site)
        groups = self._partitions(site, sides, [self.kv_heads])[self.kv_heads]
        return self._aligned(site, sides, groups, merge)

    def _pooled(self, site: Site, merge: str) -> Rewrite:
        groups = self._groups_for_pooling(site)
        spec = _merged_spec(site, groups)
        if self.grouping == "key-norm":
            counts = queries_by_norm([_key_norm(site, group) for group in groups], site.num_heads)
            spec = replace(spec, kv_of_head=tuple(g for g, n in enumerate(counts) for _ in range(n)))
        edits = merged(merge, site, _named(site, groups))
        notes = _told(site, groups, merge)
        if not self._refits(site):
            return Rewrite(spec, edits, notes=notes)
        assert site.activations is not None
        return refitted(site, spec, site.activations.edited(edits)).rewrite(self.name, edits, notes)

    def _aligned(self, site: Site, sides: tuple[Side, Side], groups: Sequence[Group], merge: str) -> Rewrite:
        spec, now = _merged_spec(site, groups), site.activations
        assert now is not None
        keys, values = ([side.align(g) if merge == "procrustes" else side.merge(g) for g in groups] for side in sides)
        inner = _key_edits(site, spec, groups, keys)
        maps = [torch.cat(m.into) for m in values]
        out = _output(site, groups, values)
        notes = _told(site, groups, merge)
        edits = (*inner, *_value_edits(site, groups, maps))
        if not self._refits(site):
            outs, bias = out_edits(site, spec, out)
            return Rewrite(spec, (*edits, *outs), bias, notes)
        fitted = refitted(site, spec, now.edited(edits), out)
        better = better_values(site, now.edited(edits), spec, groups, maps, fitted.weights)
        if better is not None:
            others = (*inner, *_value_edits(site, groups, better))
            again = refitted(site, spec, now.edited(others), fitted.weights)
            if again.error < fitted.error:
                return again.rewrite(self.name, others, notes)
        return fitted.rewrite(self.name, edits, notes)

    # ------------------------------------------------------------ choices
    def _merge(self, site: Site) -> str:
        if self.merge is not None:
            return self.merge
        if site.activations is None or self.grouping == "key-norm":
            return "mean"
        known = refuse_unknown_projections(site, ("q", "k", "v", "out"), "", "") is None
        enough = site.activations.tokens >= site.num_heads * site.value_dim
        able = known and enough and mixing_of_scores(site) is not None and mixes_values(site)
        return "score-optimal" if able else "mean"

    def _refits(self, site: Site) -> bool:
        if self.compensate is not None:
            return self.compensate == "least-squares"
        return site.activations is not None and refuse_unknown_projections(site, ("out",), "", "") is None

    def _sides(self, site: Site) -> tuple[Side, Side]:
        mixing, now = mixing_of_scores(site), site.activations
        assert mixing is not None
        assert now is not None
        require_tokens(site, now)
        weighted = self._merge(site) == "score-optimal"
        return now.once(
            f"sides, weighted={weighted}",
            site.spec,
            lambda: (keys_of(site, now, mixing, weighted), values_of(site, now, weighted)),
        )

    def _partitions(self, site: Site, sides: tuple[Side, Side], counts: Sequence[int]) -> dict[int, tuple[Group, ...]]:
        def loss(groups: Sequence[Group]) -> Tensor:
            return sides[0].loss(groups) + sides[1].loss(groups)

        heads, grouping = site.num_kv_heads, self.grouping
        if grouping == "adjacent":
            return {n: adjacent(heads, n) for n in counts}
        if grouping == "similarity":
            joined = agglomerated(heads, loss)
            return {n: joined[n] for n in counts}
        if grouping is None or isinstance(grouping, str):
            return optimal(heads, loss, counts)
        return {self.kv_heads: _by_number(grouping)}

    def _groups_for_pooling(self, site: Site) -> tuple[Group, ...]:
        if self.grouping in SEARCHED:
            return self._partitions(site, self._sides(site), [self.kv_heads])[self.kv_heads]
        if self.grouping is None or isinstance(self.grouping, str):
            return adjacent(site.num_kv_heads, self.kv_heads)
        return _by_number(self.grouping)

    # ------------------------------------------------------------ refusals
    def _refuse_sizes(self, site: Site) -> Refusal | None:
        heads = site.num_kv_heads
        grouping = self.grouping
        if grouping is not None and not isinstance(grouping, str) and len(grouping) != heads:
            found = f"{len(grouping)} numbers"
            return site.refuse("kv-heads-do-not-fit", expected=f"one group per head ({heads})", found=found)
        by_runs = grouping in (None, "adjacent", "key-norm") and (site.activations is None or grouping is not None)
        if (by_runs and heads % self.kv_heads) or self.kv_heads > heads:
            fits = [n for n in range(1, heads + 1) if heads % n == 0 or not by_runs]
            expected = f"kv_heads to be one of {', '.join(map(str, fits))}"
            return site.refuse("kv-heads-do-not-fit", expected=expected, found=str(self.kv_heads))
        return None

    def _refuse_data(self, site: Site) -> Refusal | None:
        learns = self.merge in ALIGNED or (self.merge is not None and KV_MERGES.load(self.merge).needs_calibration)
        needs = learns or self.grouping in SEARCHED or self.compensate == "least-squares"
        if needs and site.activations is None:
            hint = "pass calibration= to attnopt.optimize"
            return site.refuse("needs-calibration", expected="calibration data", found="none", hint=hint)
        if self.merge in ALIGNED or self.grouping in SEARCHED:
            known = refuse_unknown_projections(
                site, ("q", "k", "v", "out"), expected_projections(("q", "k", "v", "out")), ""
            )
            if known is not None:
                return known
            if mixing_of_scores(site) is None or not mixes_values(site):
                return site.refuse(
                    "features-are-not-linear",
                    expected="queries and keys that are only projected or rotated before the scores",
                    found="a norm or another transform after the projection",
                    hint='use merge="mean" and grouping="adjacent"',
                )
        return None


def _by_number(numbers: Sequence[int]) -> tuple[Group, ...]:
    return tuple(tuple(h for h, n in enumerate(numbers) if n == g) for g in range(max(numbers) + 1))


def _named(site: Site, groups: Sequence[Group]) -> list[Group]:
    """The groups by the original numbers of their heads."""
    return [tuple(site.spec.kv_heads[g] for g in group) for group in groups]


def _merged_spec(site: Site, groups: Sequence[Group]) -> AttentionSpec:
    group_of = {g: n for n, group in enumerate(groups) for g in group}
    return replace(
        site.spec,
        kv_heads=tuple(group[0] for group in _named(site, groups)),
        kv_of_head=tuple(group_of[g] for g in site.spec.kv_of_head),
    )


def _told(site: Site, groups: Sequence[Group], merge: str) -> tuple[str, ...]:
    text = " ".join("{" + ", ".join(map(str, g)) + "}" for g in _named(site, groups))
    return (f"grouped-query: key/value heads {text} merged by {merge}",)


def _key_norm(site: Site, group: Group) -> float:
    mean = Mean().merge(site, "k", tuple(site.spec.kv_heads[g] for g in group))
    assert mean is not None
    return float(mean.weight.double().norm())


def _key_edits(site: Site, spec: AttentionSpec, groups: Sequence[Group], keys: Sequence[Merged]) -> list[HeadWeights]:
    named = _named(site, groups)
    edits = [edit(site, "k", g[0], dict(zip(g, m.into, strict=True))) for g, m in zip(named, keys, strict=True)]
    for h, old, new in zip(spec.heads, site.spec.kv_of_head, spec.kv_of_head, strict=True):
        edits.append(edit(site, "q", h, {h: keys[new].back[groups[new].index(old)]}))
    return edits


def _value_edits(site: Site, groups: Sequence[Group], maps: Sequence[Tensor]) -> list[HeadWeights]:
    return [
        edit(site, "v", g[0], dict(zip(g, m.reshape(len(g), -1, m.shape[1]), strict=True)))
        for g, m in zip(_named(site, groups), maps, strict=True)
    ]


def _output(site: Site, groups: Sequence[Group], values: Sequence[Merged]) -> Tensor:
    """The current output weights, applied to the shared values."""
    out = output_weights(site, site.original)
    assert out is not None
    made = out.clone()
    per_head = made[:-1].view(site.num_heads, site.value_dim, -1)
    for place, g in enumerate(site.spec.kv_of_head):
        n = next(n for n, group in enumerate(groups) if g in group)
        per_head[place] = values[n].back[groups[n].index(g)].T @ per_head[place]
    return made
