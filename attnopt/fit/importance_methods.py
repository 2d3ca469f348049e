"""The ways to score heads by their names."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnopt.base.named_object import named_object
from attnopt.base.options import numbers
from attnopt.base.registry import Registry
from attnopt.errors import CalibrationError, PolicyError
from attnopt.fit import head_scores
from attnopt.fit.block_obs import nested_heads
from attnopt.ir.blame import blamed, fault, is_ours
from attnopt.ir.importance import Importance, Measured
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic
from attnopt.statistics import (
    Ablation,
    Counterfactual,
    Distance,
    Entropy,
    Fisher,
    Induction,
    KeyNorm,
    Locality,
    MassiveFeatures,
    MaxLogit,
    OvRank,
    QkRank,
    QueryNorm,
    Retrieval,
    Sahara,
    SegmentMass,
    Ships,
    SinkMass,
    Taylor,
    UniqueCodes,
)


class Weights(Importance):
    """Frobenius norm of value weights times output weights times gain."""

    name: ClassVar[str] = "weights"
    needs: ClassVar[tuple[str, ...]] = ("v", "out")

    @property
    def told(self) -> str:
        return "the norm of value times output weights"

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

    @property
    def told(self) -> str:
        return "block OBS"

    def scores(self, site: Site) -> Sequence[float]:
        return head_scores.removal_costs(site)


@dataclass(frozen=True)
class Random(Importance):
    """The same numbers for a site's name at every run: a baseline."""

    name: ClassVar[str] = "random"
    channels: ClassVar[bool] = True
    seed: int = 0

    def scores(self, site: Site) -> Sequence[float]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {site.name}".encode()))
        return torch.rand(site.num_heads, generator=generator).tolist()


Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Given(Importance):
    """One number for each head, the same for all sites or ``of_site``: pairs of a site's name and its numbers."""

    name: ClassVar[str] = "given"
    channels: ClassVar[bool] = True
    everywhere: Numbers = ()
    of_site: tuple[tuple[str, Numbers], ...] = ()

    @classmethod
    def of(cls, plain: Any) -> Given:
        """From what ``plain_scores`` gave."""
        return cls(of_site=plain) if _is_pairs(plain) else cls(everywhere=plain)

    @property
    def told(self) -> str:
        return "the given importance"

    def check(self, site: Site) -> Refusal | None:
        count, found = site.trained_heads, self._at(site)
        if found is None:
            return site.refuse("no-such-site-size", expected=f"importance scores for {site.name}", found="none")
        if len(found) == count or (self.of_site and len(found) == site.num_heads):
            return None
        expected = f"one importance score per head ({count})"
        return site.refuse("no-such-site-size", expected=expected, found=f"{len(found)} numbers")

    def scores(self, site: Site) -> Sequence[float]:
        found = self._at(site)
        assert found is not None
        return found if len(found) == site.num_heads else [found[h] for h in site.spec.heads]

    def _at(self, site: Site) -> Numbers | None:
        return dict(self.of_site).get(site.name) if self.of_site else self.everywhere


def plain_scores(owner: str, given: Any) -> Numbers | tuple[tuple[str, Numbers], ...]:
    """Numbers, or a mapping from sites to numbers, in comparable and serializable form.  Raises PolicyError."""
    pairs = list(given.items()) if isinstance(given, Mapping) else list(given) if _is_pairs(given) else None
    if pairs is None:
        return numbers(owner, "importance", given)
    named = {site: scores for site, scores in pairs if isinstance(site, str)}
    if not named or len(named) < len(pairs):
        raise PolicyError(
            f"{owner}: invalid value importance={given!r}: expected a sequence of numbers, a mapping from site "
            "names to such sequences, or the name of a method"
        )
    return tuple((site, numbers(owner, "importance", scores)) for site, scores in named.items())


def _is_pairs(given: object) -> bool:
    return (
        isinstance(given, (list, tuple))
        and bool(given)
        and all(isinstance(g, (list, tuple)) and len(g) == 2 for g in given)
    )


KIND = "importance method"
OWN: tuple[type[Importance], ...] = (
    Weights, OutputNorm, Flap, Wanda, Obs, Entropy, Locality, Random, Distance, SinkMass, MassiveFeatures, MaxLogit,
    QueryNorm, KeyNorm, SegmentMass, QkRank, OvRank, Induction, Retrieval, Counterfactual, UniqueCodes, Ablation, Taylor,
    Fisher, Ships, Sahara,
)  # fmt: skip
IMPORTANCE = Registry(
    "attnopt.importance",
    KIND,
    Importance,  # type: ignore[type-abstract]
    {kind.name: kind for kind in OWN},
    lambda cls: getattr(cls, "name", None),
)


def importance(owner: str, option: str, given: object) -> Importance:
    """An importance, a statistic of one number for each head, or a name with or without options, such as
    ``"distance(grid=(14, 14), prefix=1)"``.  Raises PolicyError that names the option, PluginError."""
    if isinstance(given, Importance):
        return given
    if isinstance(given, Statistic):
        return Measured(given)
    return named_object(IMPORTANCE, owner, option, given, hint="pass an instance of a class of attnopt.statistics")


def reads_back(how: Importance) -> bool:
    """Its text means the same: its class is registered, and its options compare and print."""
    if not IMPORTANCE.knows(type(how)):
        return False
    try:
        return importance(how.name, "text", how.to_json()) == how
    except PolicyError:
        return False


def scored(how: Importance, site: Site) -> tuple[float, ...]:
    """One number for each head that is left, higher means keep.  Raises CalibrationError, PluginError."""
    with blamed(how, KIND, "scores", site.name):
        found = tuple(map(float, how.scores(site)))
    return checked(how, site.name, found, site.num_heads)


def checked(how: Importance, site: str, found: tuple[float, ...], heads: int) -> tuple[float, ...]:
    """``found``, if they are one finite number for each head.  Raises CalibrationError, PluginError."""
    if len(found) != heads:
        raise fault(how, KIND, f"scores gave {len(found)} numbers, expected one for each of {heads} heads", site)
    if not all(map(math.isfinite, found)):
        if not is_ours(how):
            raise fault(how, KIND, f"scores gave {found}, expected finite numbers", site)
        raise CalibrationError(
            f"its {how.name} on the calibration data is not finite", site=site, hint="leave such batches out"
        )
    return found


def best_heads(
    how: Importance, site: Site, counts: Sequence[int], protected: Collection[int] = ()
) -> dict[int, tuple[int, ...]]:
    """For each of ``counts`` the heads to keep; of equal ones the first.  Raises CalibrationError, PluginError."""
    heads = site.spec.heads
    if isinstance(how, Obs):  # what one head is worth depends on the others
        places = [p for p, h in enumerate(heads) if h in protected]
        nested = nested_heads(site, places, min(counts))
        return {n: tuple(heads[p] for p in nested[n]) for n in counts}
    value = dict(zip(heads, scored(how, site), strict=True))
    ranked = sorted(heads, key=lambda h: (h in protected, value[h], -h), reverse=True)
    return {n: tuple(sorted(ranked[:n])) for n in counts}
