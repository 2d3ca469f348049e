"""Numbers of heads as plain data: scores, profiles, and sets of heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from attnopt.base.display import shown
from attnopt.errors import PolicyError
from attnopt.ir.curves import Curves


@dataclass(frozen=True)
class HeadImportance(Mapping[str, tuple[float, ...]]):
    """Scores by site name: one number per head, higher means keep; ``heads`` holds the head numbers.

    Prints as a table; can be passed to ``PruneHeads(importance=...)``.
    """

    method: str
    scores: Mapping[str, tuple[float, ...]]
    heads: Mapping[str, tuple[int, ...]]

    def __getitem__(self, site: str) -> tuple[float, ...]:
        return self.scores[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        return shown(self, "text")

    @property
    def means(self) -> dict[str, float]:
        """The mean over the heads of each site, in order of depth."""
        return {site: sum(scores) / len(scores) for site, scores in self.scores.items()}

    def since(self, before: Self) -> Self:
        """The absolute change of each score since ``before``, of the same method, sites and heads: during training, the change
        of key norms by which DGQA allots queries (arXiv:2408.08454), or the growth of logits.  Raises PolicyError."""
        if (self.method, self.heads) != (before.method, before.heads):
            raise PolicyError(f"{self.method} cannot be compared with {before.method} of other heads or another method")
        changes = {
            site: tuple(abs(now - then) for now, then in zip(scores, before.scores[site], strict=True))
            for site, scores in self.scores.items()
        }
        return type(self)(f"change of {self.method}", changes, self.heads)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "method": self.method,
            "scores": {site: list(scores) for site, scores in self.scores.items()},
            "heads": {site: list(numbers) for site, numbers in self.heads.items()},
        }


@dataclass(frozen=True)
class HeadProfile(Mapping[str, Curves]):
    """Curves by site name, one for each head; ``heads`` holds the head numbers.  Prints as a table."""

    method: str
    curves: Mapping[str, Curves]
    heads: Mapping[str, tuple[int, ...]]

    def __getitem__(self, site: str) -> Curves:
        return self.curves[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.curves)

    def __len__(self) -> int:
        return len(self.curves)

    def __str__(self) -> str:
        return shown(self, "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "method": self.method,
            "curves": {site: curves.to_json() for site, curves in self.curves.items()},
            "heads": {site: list(numbers) for site, numbers in self.heads.items()},
        }


@dataclass(frozen=True)
class HeadSet:
    """Heads in the order in which a greedy search added them: ``steps`` holds the site, the head, and how far the model has
    moved with it and all before it ablated.  Prints as a table."""

    method: str
    steps: tuple[tuple[str, int, float], ...]

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """The heads of each site: ``{site: PruneHeads(0.5, protect=heads) for site, heads in found.heads.items()}``."""
        sites = dict.fromkeys(site for site, _, _ in self.steps)
        return {site: tuple(sorted(h for s, h, _ in self.steps if s == site)) for site in sites}

    def __str__(self) -> str:
        return shown(self, "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {"method": self.method, "steps": [list(step) for step in self.steps]}
