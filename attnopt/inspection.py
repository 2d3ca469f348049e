"""What ``attnopt.inspect`` returns."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.site import NearMiss, Site


@dataclass(frozen=True)
class Inspection:
    """What ``attnopt.inspect`` found, in the order in which it runs."""

    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]
    candidates: int  # how many normalisers were looked at

    def __str__(self) -> str:
        from attnopt.tables import inspection_table, to_text

        return to_text(inspection_table(self))

    def _repr_html_(self) -> str:
        from attnopt.page import inspection_fragment

        return inspection_fragment(self)
