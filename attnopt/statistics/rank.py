"""How many dimensions of a head are used on the data: of its scores, and of what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.options import number
from attnopt.errors import CalibrationError, PolicyError
from attnopt.ir.curves import Curves
from attnopt.ir.importance import Importance
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic
from attnopt.statistics.calibrated import sequences_of

ROOM = 1e-12  # of the explained share, for rounding
ROUNDING = 1e-12  # of the energy of keys: what float32 leaves of a constant


@dataclass(frozen=True)
class QkRank(Importance):
    """The rank of W_Q' W_K that the data need (arXiv:2307.09458, where Q and K of some heads compress)::

        sigma = singular values of C_q^1/2 C_k^1/2     # those of Q K' for all pairs of tokens, weighted by the activations
        min r: sum_{i <= r} sigma_i^2 >= explained * sum_i sigma_i^2

    C_q is the second moment of the queries; C_k that of the keys minus their mean over the sequence, which changes no weight:
    it adds the same to all scores of a query.  The profile is the share that the first r explain.  Raises PolicyError.
    """

    name: ClassVar[str] = "qk-rank"
    needs_calibration: ClassVar[bool] = True
    explained: float = 0.99

    def __post_init__(self) -> None:
        _check(self.name, self.explained)

    def scores(self, site: Site) -> Sequence[float]:
        return _needed(QkSpectrum().of(site), self.explained)

    def profile(self, site: Site) -> Curves:
        return _shares(QkSpectrum().of(site))


@dataclass(frozen=True)
class OvRank(Importance):
    """The rank of W_V W_O that the data need: as "qk-rank", with sigma the singular values of C_v^1/2 W_O,h, where C_v is the
    second moment of the values.  Raises PolicyError."""

    name: ClassVar[str] = "ov-rank"
    needs: ClassVar[tuple[str, ...]] = ("out",)
    needs_calibration: ClassVar[bool] = True
    explained: float = 0.99

    def __post_init__(self) -> None:
        _check(self.name, self.explained)

    def scores(self, site: Site) -> Sequence[float]:
        return _needed(OvSpectrum().of(site), self.explained)

    def profile(self, site: Site) -> Curves:
        return _shares(OvSpectrum().of(site))


@dataclass(frozen=True)
class QkSpectrum(Statistic[Tensor]):
    """Squared singular values [H, D], descending."""

    def measure(self, site: Site) -> Tensor:
        root = _root(_summed(_moment(x) for x in sequences_of(site, "q")))
        keys, whole = (
            _summed(_moment(x - x.mean(0) if centred else x) for x in sequences_of(site, "k") if len(x))
            for centred in (True, False)
        )
        varies = _trace(keys) > ROUNDING * _trace(whole)
        return _descending(root @ keys @ root) * varies.unsqueeze(1)


@dataclass(frozen=True)
class OvSpectrum(Statistic[Tensor]):
    """Squared singular values [H, Dv], descending."""

    def measure(self, site: Site) -> Tensor:
        out = [site.head_weight("out", h) for h in site.spec.heads]
        known = [w.double().cpu() for w in out if w is not None]
        if len(known) < site.num_heads or not site.knows("out"):
            raise CalibrationError("the output projection of its heads is unknown", site=site.name)
        outer = torch.stack([w @ w.mT for w in known])
        root = _root(_summed(_moment(x) for x in sequences_of(site, "v")))
        return _descending(root @ outer @ root)


def _summed(moments: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(moments)).sum(0)


def _trace(x_HDD: Tensor) -> Tensor:
    return x_HDD.diagonal(dim1=1, dim2=2).sum(1)


def _moment(x_NHD: Tensor) -> Tensor:
    """[H, D, D]"""
    x_HND = x_NHD.transpose(0, 1)
    return (x_HND.mT @ x_HND).cpu()


def _root(moment_HDD: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(moment_HDD)
    root: Tensor = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    return root


def _descending(matrix_HDD: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh((matrix_HDD + matrix_HDD.mT) / 2)
    return values.clamp(min=0).flip(-1)


def _explained(spectrum_HD: Tensor) -> Tensor:
    """The share of the sum that the first values have; 1 where all are zero."""
    total = spectrum_HD.sum(1, keepdim=True)
    return torch.where(total > 0, spectrum_HD.cumsum(1) / total.clamp(min=torch.finfo(torch.float64).tiny), 1.0)


def _needed(spectrum_HD: Tensor, explained: float) -> list[float]:
    enough = _explained(spectrum_HD) >= explained - ROOM
    rank = 1.0 + enough.double().argmax(1)
    return torch.where(spectrum_HD.sum(1) > 0, rank, 0.0).tolist()


def _shares(spectrum_HD: Tensor) -> Curves:
    return Curves.of("rank", range(1, spectrum_HD.shape[1] + 1), _explained(spectrum_HD))


def _check(owner: str, explained: object) -> None:
    if not 0 < number(owner, "explained", explained) <= 1:
        raise PolicyError(f"{owner}: invalid value explained={explained!r}: expected a number above 0, at most 1")
