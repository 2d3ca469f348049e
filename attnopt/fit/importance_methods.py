"""The ways to score heads by their names."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import ClassVar

import torch

from attnopt.base.registry import Registry
from attnopt.errors import CalibrationError
from attnopt.fit import head_scores
from attnopt.ir.blame import blamed, fault, is_ours
from attnopt.ir.importance import Importance
from attnopt.ir.site import Site


class Weights(Importance):
    """Frobenius norm of value weights times output weights times gain."""

    name: ClassVar[str] = "weights"
    needs: ClassVar[tuple[str, ...]] = ("v", "out")

    def scores(self, site: Site) -> Sequence[float]:
        return head_scores.weight_norms(site)


class OutputNorm(Importance):
    """Mean length of what the head adds to the layer's output."""

    name: ClassVar[str] = "output-norm"
    needs: ClassVar[tuple[str, ...]] = ("out",)
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return head_scores.output_norms(site)


class Flap(Importance):
    """Variance of what the head adds (FLAP, arXiv:2312.11983)."""

    name: ClassVar[str] = "flap"
    needs: ClassVar[tuple[str, ...]] = ("out",)
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return head_scores.fluctuations(site)


class Wanda(Importance):
    """Output weights times the size of their inputs (Wanda, arXiv:2306.11695)."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[tuple[str, ...]] = ("out",)
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return head_scores.wanda(site)


class Obs(Importance):
    """The rise of the layer's error when the other heads make up for this one (OSSCAR, arXiv:2403.12983)."""

    name: ClassVar[str] = "obs"
    needs: ClassVar[tuple[str, ...]] = ("out",)
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return head_scores.removal_costs(site)


class Entropy(Importance):
    """How far the attention is from uniform."""

    name: ClassVar[str] = "entropy"
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return head_scores.focus(site)


class Locality(Importance):
    """How near to the query the attention stays."""

    name: ClassVar[str] = "locality"
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return head_scores.locality(site)


class Random(Importance):
    """The same numbers for a site's name at every run: a baseline."""

    name: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, site: Site) -> Sequence[float]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {site.name}".encode()))
        return torch.rand(site.num_heads, generator=generator).tolist()


IMPORTANCE = Registry(
    "attnopt.importance",
    "importance method",
    Importance,  # type: ignore[type-abstract]
    {kind.name: kind for kind in (Weights, OutputNorm, Flap, Wanda, Obs, Entropy, Locality, Random)},
    lambda cls: getattr(cls, "name", None),
)


def scores_at(site: Site, method: str, seed: int = 0) -> tuple[float, ...]:
    """One number for each head that is left, higher means keep.

    ``seed``: of "random".  Raises PolicyError for an unknown method, CalibrationError, PluginError.
    """
    kind = IMPORTANCE.load(method)
    how = Random(seed) if kind is Random else kind()
    with blamed(how, "importance method", "scores", site.name):
        found = tuple(map(float, how.scores(site)))
    if len(found) != site.num_heads:
        wrong = f"scores gave {len(found)} numbers, expected one for each of {site.num_heads} heads"
        raise fault(how, "importance method", wrong, site.name)
    if not all(map(math.isfinite, found)):
        if not is_ours(how):
            raise fault(how, "importance method", f"scores gave {found}, expected finite numbers", site.name)
        raise CalibrationError(
            f"its {method} on the calibration data is not finite", site=site.name, hint="leave such batches out"
        )
    return found
