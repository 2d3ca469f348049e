"""What a policy leaves open: for each attention, the passes that it may get."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.interfaces import Pass


@dataclass(frozen=True)
class SiteChoices:
    """The alternatives of one attention, all different; an empty one leaves it as it is."""

    site: str
    alternatives: tuple[tuple[Pass, ...], ...]
