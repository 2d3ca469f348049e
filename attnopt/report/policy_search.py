"""What a search for a policy found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from attnopt.base.display import shown
from attnopt.base.page import Page


@dataclass(frozen=True)
class Tried:
    """One policy: its costs by resource, how far it diverges, and what it does to each attention, in words."""

    costs: Mapping[str, float]
    divergence: float
    choices: Mapping[str, str]


@dataclass(frozen=True)
class SearchReport(Page):
    """``limits`` and ``original``: by resource the most that was allowed, and what the original costs.

    ``measure``: what ``divergence`` is.  ``best``: what was found, if anything fits; ``uniform``: the best with the same passes
    everywhere, if one fits; ``front``: the best for each budget, by its first resource.  ``evaluations``: how often a model was
    judged, in passes over all data.  ``latency``: measured milliseconds of the whole model beside those that the search
    counted with, "measured" and "predicted".  ``refused``: attention, passes, reason.  Prints as a table.
    """

    budget: str
    measure: str
    limits: Mapping[str, float]
    original: Mapping[str, float]
    best: Tried | None
    uniform: Tried | None
    front: tuple[Tried, ...]
    evaluations: float
    policies: int
    seconds: float
    is_complete: bool
    latency: Mapping[str, float]
    refused: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shown(self, "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {**asdict(self), "refused": [list(r) for r in self.refused]}
