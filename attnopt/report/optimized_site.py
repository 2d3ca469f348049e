"""A site of an optimized model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from attnopt.ir.cost import Cost
from attnopt.ir.site import Site
from attnopt.report.report import SiteReport, Status


@dataclass(frozen=True)
class OptimizedSite(Site):
    """A site in its current form, with what was done to it: ``status`` "rewritten", "unchanged" or "refused", the
    relative ``error`` of its lowered form if it has one, and its cost before and after.
    """

    status: Status = "unchanged"
    error: float | None = None
    cost_before: Cost = Cost(0, 0, 0)  # noqa: RUF009  (it is frozen)
    cost_after: Cost = Cost(0, 0, 0)  # noqa: RUF009

    @classmethod
    def of(cls, site: Site, entry: SiteReport) -> Self:
        known = {f.name: getattr(site, f.name) for f in fields(Site)}
        return cls(
            **{**known, "refusals": entry.refusals},
            status=entry.status,
            error=entry.error,
            cost_before=entry.cost_before,
            cost_after=entry.cost_after,
        )
