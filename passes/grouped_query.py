"""Share key/value heads between query heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.base.options import choice, whole
from attnopt.errors import PolicyError
from attnopt.fit.compensation_methods import COMPENSATIONS, chosen
from attnopt.fit.kv_sides import loss_at
from attnopt.fit.merge_and_fit import merged_and_fitted
from attnopt.fit.merge_methods import KV_MERGES, best_merge
from attnopt.fit.partition_methods import (
    KV_PARTITIONS,
    Adjacent,
    ByNumber,
    fitting_counts,
    groups_of,
    merged_spec,
    partitions,
)
from attnopt.ir.activations import INVENTED
from attnopt.ir.head_routing import Routed
from attnopt.ir.interfaces import Pass, Rewrite, Share, SharesBudget
from attnopt.ir.kv_merge import KvMerge
from attnopt.ir.kv_partition import Group, KvPartition
from attnopt.ir.plugin_calls import check_part
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    BUDGETS,
    expected_projections,
    refuse_edits,
    refuse_fitted_selection,
    refuse_no_data,
    refuse_rows,
    refuse_transforms,
    refuse_transplants,
    refuse_unknown_projections,
)

ROLES = ("q", "k", "v", "out")


@dataclass(frozen=True)
class GroupedQuery(Pass, SharesBudget):
    """Merge key/value heads down to ``kv_heads`` (GQA, arXiv:2305.13245); a group keeps the number of its first head.

    ``grouping``: which heads are merged: ``"adjacent"`` runs; ``"similarity"``: heads with the most similar keys and
    values, joined pair by pair; ``"key-norm"``: adjacent heads, with more queries for larger keys (KDGQA,
    arXiv:2408.08454); ``"optimal"``: the partition with the least loss; the name of a registered ``KvPartition``; or
    the group number of each current head.
    ``merge``: ``"mean"`` or ``"first"`` of the weights in the group; ``"procrustes"``: the mean after aligning each
    head with the first (arXiv:2412.20677); ``"svd"``: the subspace with most of the energy of the keys, and of the
    values; ``"score-optimal"``: the subspace that best preserves the scores and the layer output; or the name of a
    registered ``KvMerge``.  Those that learn fold the change of basis into the query and output projections; with rotary
    positions they act on each frequency separately.
    ``compensate``: ``"none"``; ``"least-squares"``: fit shared values and the output projection to the original layer
    output; or the name of a registered ``Compensation`` for merges.
    ``budget``: ``kv_heads`` at each site (``"site"``), or on average (``"global"``), with more where the model output
    is more sensitive.

    Defaults: with calibration data, optimal, score-optimal, least squares and a global budget, if the projections of
    the site allow it; otherwise adjacent and mean.  Where an encoder reads token ids, all that is fitted is fitted to random
    tokens, too, so that it depends less on the domain of the data.  Raises PolicyError.
    """

    name: ClassVar[str] = "grouped-query"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    widens: ClassVar[bool] = True
    kv_heads: int
    merge: str | None = None
    grouping: str | Sequence[int] | None = None
    compensate: str | None = None
    budget: str | None = None

    def __post_init__(self) -> None:
        whole(self.name, "kv_heads", self.kv_heads, least=1)
        merge = None if self.merge is None else KV_MERGES.choose(self.name, "merge", self.merge)
        if isinstance(self.grouping, str):
            partition = KV_PARTITIONS.choose(self.name, "grouping", self.grouping)
            if partition.moves_queries and merge is not None and merge.adapts_readers:
                raise PolicyError(
                    f"grouped-query: invalid value merge={self.merge!r} with grouping={self.grouping!r}, which changes "
                    "the head that a query reads: expected merge='mean'"
                )
        elif self.grouping is not None:
            object.__setattr__(self, "grouping", ByNumber.read(self.name, self.grouping, self.kv_heads))
        if self.compensate is not None and not COMPENSATIONS.choose(self.name, "compensate", self.compensate).merges:
            raise PolicyError(
                f"grouped-query: invalid value compensate={self.compensate!r}: it does not make up for merged heads"
            )
        if self.budget is not None:
            choice(self.name, "budget", self.budget, BUDGETS)

    # ------------------------------------------------------------ a budget for all sites
    @property
    def is_shared(self) -> bool:
        return self.budget == "global" or (self.budget is None and self.grouping is None)

    def total(self, sites: Sequence[Site]) -> int:
        return sum(min(self.kv_heads, site.num_kv_heads) for site in sites)

    def shares(self, site: Site) -> Mapping[int, Share]:
        heads, merge = site.num_kv_heads, self._merge(site)
        if not merge.adapts_readers:
            return {min(self.kv_heads, heads): Share(0.0, replace(self, budget="site"))}
        loss, found = loss_at(site, merge.by_scores), dict[int, Share]()
        for count, groups in partitions(self._partition(site), site, range(1, heads + 1), loss).items():
            numbers = tuple(next(n for n, g in enumerate(groups) if h in g) for h in site.spec.kv_heads)
            lost = sum(float(loss([g])[0]) for g in groups)
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
        refused = refuse_edits(
            site, edits=edited, hint="apply grouped-query before heads are routed, replaced or steered"
        )
        refused = refused or refuse_transplants(site, "apply grouped-query before transplant")
        refused = refused or refuse_fitted_selection(site, "apply grouped-query before dynamic-sparse")
        refused = refused or refuse_rows(
            site, "apply grouped-query before query-rows, whose scores read queries and keys"
        )
        return refused or self._refuse_sizes(site) or self._refuse_parts(site)

    def rewrite(self, site: Site) -> Rewrite:
        if self.kv_heads == site.num_kv_heads:
            return Rewrite(site.spec)
        merge, partition = self._merge(site), self._partition(site)
        groups = groups_of(partition, site, self.kv_heads, loss_at(site, merge.by_scores))
        spec = merged_spec(partition, site, groups)
        fit = chosen(self.compensate, site)
        made = merged_and_fitted(merge, site, groups, spec, fit)
        widened = _widened(site) if merge.needs_calibration or fit.needs_calibration else ()
        notes = (_told(groups, merge), *(f"grouped-query: {note}" for note in (*made.notes, *widened)))
        return replace(made, notes=notes)

    # ------------------------------------------------------------ choices
    def _merge(self, site: Site) -> KvMerge:
        if self.merge is not None:
            return KV_MERGES.make(self.merge)
        moves_queries = isinstance(self.grouping, str) and KV_PARTITIONS.load(self.grouping).moves_queries
        return KV_MERGES.make("mean") if moves_queries else best_merge(site)

    def _partition(self, site: Site) -> KvPartition:
        if isinstance(self.grouping, str):
            return KV_PARTITIONS.make(self.grouping)
        if self.grouping is not None:
            return ByNumber(tuple(self.grouping))
        if site.activations is None:
            return Adjacent()
        return KV_PARTITIONS.make("optimal") if self._merge(site).adapts_readers else Adjacent(even=False)

    # ------------------------------------------------------------ refusals
    def _refuse_sizes(self, site: Site) -> Refusal | None:
        partition = self._partition(site)
        if (refused := check_part(partition, KV_PARTITIONS.kind, site)) is not None:
            return refused
        fits = fitting_counts(partition, site)
        if self.kv_heads in fits:
            return None
        expected = f"kv_heads to be one of {', '.join(map(str, fits))}"
        return site.refuse("kv-heads-do-not-fit", expected=expected, found=str(self.kv_heads))

    def _refuse_parts(self, site: Site) -> Refusal | None:
        merge, partition, fit = self._merge(site), self._partition(site), chosen(self.compensate, site)
        linear = merge.adapts_readers or partition.needs_loss
        learns = linear or merge.needs_calibration or partition.needs_calibration or fit.needs_calibration
        needed = {*ROLES} if linear else {*merge.needs, *fit.needs}
        roles = [role for role in ROLES if role in needed]
        return (
            (refuse_no_data(site) if learns else None)
            or refuse_unknown_projections(site, roles, expected_projections(roles), "")
            or (refuse_transforms(site, 'use merge="mean" and grouping="adjacent"') if linear else None)
            or check_part(merge, KV_MERGES.kind, site)
            or check_part(fit, COMPENSATIONS.kind, site)
        )


def _widened(site: Site) -> tuple[str, ...]:
    now = site.activations
    if now is None or now.invented is None:
        return ()
    return (f"fitted to {now.invented.tokens} random tokens, too, which count {INVENTED:g} times as much as the data",)


def _told(groups: Sequence[Group], merge: KvMerge) -> str:
    text = " ".join("{" + ", ".join(map(str, g)) + "}" for g in groups)
    return f"grouped-query: key/value heads {text} merged by {merge.name}"
