"""How far a head looks: the distance between queries and the keys that they attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnopt.base.options import choice, whole, whole_tuple
from attnopt.errors import CalibrationError
from attnopt.ir.curves import Curves
from attnopt.ir.importance import Importance
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic
from attnopt.statistics.calibrated import rows_of

NORMS = {"euclidean": 2.0, "chebyshev": float("inf")}


@dataclass(frozen=True)
class Distance(Importance):
    """Mean attention distance, in tokens (arXiv:2010.11929, figure 7; arXiv:2108.08810)::

        sum_ij p_ij |x_i - x_j| / sum_ij p_ij     # over queries i and keys j of the grid that are no padding

    ``grid``: the sizes of a 1-D, 2-D or 3-D grid of tokens in row-major order; None: tokens in a row, as many as there are.
    ``prefix``: number of class and register tokens before it, which count neither as queries nor as keys: the mass on them
    is left out, where an average without the division would call it near.
    ``metric``: "euclidean", or "chebyshev", by which a square window holds all keys up to a distance.
    The profile is the share of the mass at each distance, rounded to whole tokens.  Raises PolicyError.
    """

    name: ClassVar[str] = "distance"
    needs_calibration: ClassVar[bool] = True
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    metric: str = "euclidean"

    def __post_init__(self) -> None:
        if self.grid is not None:
            object.__setattr__(self, "grid", whole_tuple(self.name, "grid", self.grid, None, least=1))
        whole(self.name, "prefix", self.prefix)
        choice(self.name, "metric", self.metric, tuple(NORMS))

    def check(self, site: Site) -> Refusal | None:
        if site.is_cross or site.alignment == "none":
            found = "keys from another sequence" if site.is_cross else "lengths that vary independently"
            return site.refuse("needs-self-attention", expected="queries and keys of one sequence", found=found)
        expected = self.prefix + prod(self.grid or ())
        if self.grid is None or site.is_dynamic or site.kv_len == expected:
            return None
        return site.refuse("wrong-length", expected=f"{self._told} tokens", found=f"{site.kv_len} tokens")

    def scores(self, site: Site) -> Sequence[float]:
        masses = _Masses(self).of(site)
        return (masses.moment / masses.total).tolist()

    def profile(self, site: Site) -> Curves:
        masses = _Masses(self).of(site)
        return Curves.of("distance in tokens", range(masses.at.shape[1]), masses.at / masses.total.unsqueeze(1))

    def apart(self, site: Site, rows: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """Which of these rows of ``queries`` are on the grid, bool [R], and their distances [R', S'] from its keys, those after
        the prefix.  Raises CalibrationError."""
        places, at = self.places(site, keys), rows + (0 if site.alignment == "first" else keys - queries)
        on_grid = at >= self.prefix
        return on_grid, torch.cdist(places[at[on_grid] - self.prefix], places, p=NORMS[self.metric])

    @property
    def _told(self) -> str:
        return f"{self.prefix} + {' x '.join(map(str, self.grid or ()))}"

    def places(self, site: Site, length: int) -> Tensor:
        """Where the tokens after the prefix lie, [N, axes].  Raises CalibrationError."""
        if self.grid is None and length > self.prefix:
            return torch.arange(length - self.prefix, dtype=torch.float64).unsqueeze(1)
        if self.grid is None or length != self.prefix + prod(self.grid):
            raise CalibrationError(
                f"its {length} tokens are not the {self._told} of {self.to_json()}",
                site=site.name,
                hint="give the grid of this site, or score it apart from the others with sites=",
            )
        axes = [torch.arange(side, dtype=torch.float64) for side in self.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


@dataclass(frozen=True)
class Locality(Importance):
    """Negative mean distance, in tokens, between a query and the keys that it attends to: the nearest are kept."""

    name: ClassVar[str] = "locality"
    needs_calibration: ClassVar[bool] = True

    def check(self, site: Site) -> Refusal | None:
        return Distance().check(site)

    def scores(self, site: Site) -> Sequence[float]:
        return [-d for d in Distance().scores(site)]


@dataclass(frozen=True)
class _Mass:
    """Of each head: all of the mass [H], the sum of mass times distance [H], and the mass at each whole distance [H, N]."""

    total: Tensor
    moment: Tensor
    at: Tensor


@dataclass(frozen=True)
class _Masses(Statistic[_Mass]):
    how: Distance

    def measure(self, site: Site) -> _Mass:
        prefix = self.how.prefix
        total, moment = (torch.zeros(site.num_heads, dtype=torch.float64) for _ in range(2))
        at = torch.zeros(site.num_heads, 1, dtype=torch.float64)
        for block in rows_of(site):
            on_grid, apart = self.how.apart(site, block.rows.cpu(), block.queries, len(block.keys))
            p = block.weights.cpu()[:, on_grid, prefix:]
            total += p.sum((1, 2))
            moment += (p * apart).sum((1, 2))
            bins = (apart + 0.5).floor().long().flatten()
            beyond = int(bins.max()) + 1 - at.shape[1] if len(bins) else 0
            at = pad(at, (0, max(0, beyond))).index_add(1, bins, p.flatten(1))
        blind = [h for h, mass in zip(site.spec.heads, total.tolist(), strict=True) if mass == 0]
        if blind:
            raise CalibrationError(
                f"between the tokens of {self.how.to_json()} heads {blind} have no attention", site=site.name
            )
        return _Mass(total, moment, at)
