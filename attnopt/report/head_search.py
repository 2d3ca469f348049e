"""What a search for heads found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnopt.base.display import shown

Head = tuple[str, int]  # site, number in the trained model
Heads = frozenset[Head]


@dataclass(frozen=True)
class SearchStep:
    """``added`` and, of a swap, ``removed``; ``value``: the objective after it."""

    added: Head
    removed: Head | None
    value: float


@dataclass(frozen=True)
class HeadSearch:
    """``chosen``: the heads, in the order of their choice; ``value``: the objective with them edited, ``base`` without any edit.

    ``policy``: the edit of these heads, for ``attnopt.optimize`` or ``attnopt.guidance``.  ``evaluated``: every set of heads that
    was tried, with its objective.  ``is_complete``: False if a limit or an error ended the search early.  Prints as a table.
    """

    method: str
    chosen: tuple[Head, ...]
    base: float
    value: float
    steps: tuple[SearchStep, ...]
    policy: Mapping[str, Any]
    evaluated: Mapping[Heads, float] = field(repr=False)
    is_complete: bool = True

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """The chosen heads by site."""
        sites = dict.fromkeys(site for site, _ in self.chosen)
        return {name: tuple(sorted(h for site, h in self.chosen if site == name)) for name in sites}

    def __str__(self) -> str:
        return shown(self, "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "method": self.method,
            "chosen": [list(head) for head in self.chosen],
            "base": self.base,
            "value": self.value,
            "steps": [
                {"added": list(s.added), "removed": None if s.removed is None else list(s.removed), "value": s.value}
                for s in self.steps
            ],
            "evaluated": [[sorted(map(list, heads)), value] for heads, value in self.evaluated.items()],
            "is_complete": self.is_complete,
        }
