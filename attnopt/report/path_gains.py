"""Gains of the paths of a residual stream, as they were fitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from attnopt.base.display import shown


@dataclass(frozen=True)
class PathGains(Mapping[str, float | Sequence[float]]):
    """By path its gain, as ``attnopt.path_gain`` takes them; those of ``fixed`` were given.

    ``before``, ``after``: the mean squared error on the calibration data with gains of 1 in the place of the fitted ones, and
    with these; ``steps``: of the fit.  Prints as a table.
    """

    gains: Mapping[str, float | Sequence[float]]
    fixed: frozenset[str]
    before: float
    after: float
    steps: int

    def __getitem__(self, path: str) -> float | Sequence[float]:
        return self.gains[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.gains)

    def __len__(self) -> int:
        return len(self.gains)

    def __str__(self) -> str:
        return shown(self, "text")
