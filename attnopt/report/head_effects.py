"""What a metric of the model says with one head changed after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attnopt.base.display import shown
from attnopt.errors import CalibrationError


@dataclass(frozen=True)
class HeadEffects(Mapping[str, tuple[float, ...]]):
    """The metric by site name: one number for each head of ``heads[site]``, with this head alone patched.

    ``direction``: "denoising", values of the clean run in the corrupted run, or "noising", the reverse.  ``clean`` and
    ``corrupted``: the metric of these runs.  ``paths``: where the patched values go, if not everywhere.  Prints as a table of
    ``effects``.
    """

    direction: str
    clean: float
    corrupted: float
    metrics: Mapping[str, tuple[float, ...]]
    heads: Mapping[str, tuple[int, ...]]
    paths: str = ""

    def __getitem__(self, site: str) -> tuple[float, ...]:
        return self.metrics[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def __str__(self) -> str:
        return shown(self, "text")

    @property
    def ends(self) -> tuple[float, float]:
        """The metric of the run that is patched, and of the run that the values are from."""
        return (self.corrupted, self.clean) if self.direction == "denoising" else (self.clean, self.corrupted)

    @property
    def effects(self) -> dict[str, tuple[float, ...]]:
        """How far each head takes the metric from that of the patched run (0) to that of the other run (1).

        Raises CalibrationError if the metric is the same in both."""
        base, other = self.ends
        apart = other - base
        if abs(apart) <= 1e-12 * max(abs(base), abs(other)):
            raise CalibrationError(
                f"the metric is {base:.6g} in both runs, so there is no fraction of their difference",
                hint="read the metric itself, or choose inputs that it tells apart",
            )
        return {site: tuple((m - base) / apart for m in values) for site, values in self.metrics.items()}

    def top(self, count: int = 10) -> tuple[tuple[str, int, float], ...]:
        """(site, head, metric) of the heads that change the metric most, those first."""
        base, _ = self.ends
        every = [
            (site, head, m)
            for site, values in self.metrics.items()
            for head, m in zip(self.heads[site], values, strict=True)
        ]
        return tuple(sorted(every, key=lambda one: -math.fabs(one[2] - base))[:count])

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "direction": self.direction,
            "clean": self.clean,
            "corrupted": self.corrupted,
            "metrics": {site: list(values) for site, values in self.metrics.items()},
            "heads": {site: list(numbers) for site, numbers in self.heads.items()},
            "paths": self.paths,
        }
