"""The result of ``attnopt.inspect``."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.base.display import shown
from attnopt.ir.site import NearMiss, Site


@dataclass(frozen=True)
class Inspection:
    """What ``attnopt.inspect`` found, in execution order."""

    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]
    candidates: int  # number of softmax anchors examined

    def __str__(self) -> str:
        return shown(self, "text")

    def _repr_html_(self) -> str:
        return shown(self, "html")
