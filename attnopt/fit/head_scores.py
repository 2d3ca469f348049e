"""Head scores of one site, from its weights and its activations on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.fit.block_obs import surgeon_of
from attnopt.fit.least_squares import output_weights
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic
from attnopt.statistics.calibrated import outputs_of


def weight_norms(site: Site) -> list[float]:
    """Frobenius norm of the map of each head: value weights times output weights times gain."""
    return [_norm(site, place) for place in range(site.num_heads)]


def _norm(site: Site, place: int) -> float:
    spec = site.spec
    value = site.head_weight("v", spec.kv_heads[spec.kv_of_head[place]])
    out = site.head_weight("out", spec.heads[place])
    if value is None or out is None:
        raise CalibrationError("its value or output projection is unknown", site=site.name)
    value, out = value.double(), out.double()
    squared = ((value @ value.mT) * (out @ out.mT)).sum()  # |V'O|^2 without the [in, out] product
    return float(squared.clamp(min=0).sqrt()) * abs(spec.gains.get(spec.heads[place], 1.0))


def output_norms(site: Site) -> list[float]:
    """Mean over tokens of |z_h W_o,h|: the norm of the head's contribution to the layer output."""
    total, tokens = torch.zeros(site.num_heads, dtype=torch.float64), 0
    out = output_maps(site)
    for z_NHD in outputs_of(site):
        total += torch.einsum("nhd,hde->hne", z_NHD, out).norm(dim=-1).sum(1)
        tokens += len(z_NHD)
    return (total / max(tokens, 1)).tolist()


def fluctuations(site: Site) -> list[float]:
    """FLAP (arXiv:2312.11983): the variance of each feature over tokens times its output weights' squared norm."""
    mean, square, _ = FeatureMoments().of(site)
    return ((square - mean.square()) * output_maps(site).square().sum(-1)).sum(-1).tolist()


def wanda(site: Site) -> list[float]:
    """Wanda (arXiv:2306.11695): absolute output weight times the feature's root mean square, summed over the head."""
    _, square, _ = FeatureMoments().of(site)
    return (square.sqrt() * output_maps(site).abs().sum(-1)).sum(-1).tolist()


def mean_outputs(site: Site) -> Tensor:
    """[H, Dv] in float64: mean output of each head over the calibration tokens without padding.  Raises CalibrationError."""
    if not site.spec.has_own_maps:
        raise CalibrationError(
            "its heads attend between channels, depend on each other, or have no softmax: their outputs are not averaged",
            site=site.name,
            hint="replace outputs by zeros, or give sites= without it",
        )
    return FeatureMoments().of(site)[0]


def removal_costs(site: Site) -> list[float]:
    """Block OBS: the increase of the layer's squared error without the head, with optimal compensation by the others."""
    return surgeon_of(site).removal_costs(range(site.num_heads))


def output_maps(site: Site) -> Tensor:
    """Output weights [H, Dv, out] of the remaining heads, in float64.  Raises CalibrationError if unknown."""
    weights = output_weights(site, site.original)
    if weights is None:
        out = site.projections.get("out")
        why = out.why if out is not None and out.why else "it was not found"
        raise CalibrationError(f"the output projection is unknown: {why}", site=site.name)
    if not site.projections["out"].direct:
        raise CalibrationError(
            "the head outputs are scaled before the output projection",
            site=site.name,
            hint='choose "ablation", which needs no projection',
        )
    return weights[:-1].reshape(site.num_heads, site.value_dim, -1)


@dataclass(frozen=True)
class FeatureMoments(Statistic[tuple[Tensor, Tensor, int]]):
    """Mean and mean square [H, Dv] of the head outputs, in float64, and the number of tokens."""

    merges: ClassVar[bool] = True

    def measure(self, site: Site) -> tuple[Tensor, Tensor, int]:
        total, square, tokens = torch.zeros(()), torch.zeros(()), 0
        for z in outputs_of(site):
            total, square, tokens = total + z.sum(0), square + z.square().sum(0), tokens + len(z)
        return total / tokens, square / tokens, tokens

    def merged(self, parts: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, int]:
        tokens = sum(n for _, _, n in parts)
        weights = [n / tokens for _, _, n in parts]
        mean = torch.stack([w * part for w, (part, _, _) in zip(weights, parts, strict=True)]).sum(0)
        square = torch.stack([w * part for w, (_, part, _) in zip(weights, parts, strict=True)]).sum(0)
        return mean, square, tokens
