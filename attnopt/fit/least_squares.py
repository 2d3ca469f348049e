"""Closed-form refit of the output projection to the layer output before the heads were changed.

Least squares with shrinkage toward the current weights, from float64 moments; accepted as far as held-out data agree
(OSSCAR, arXiv:2403.12983; the guard is a line search between the old weights and the new ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.ir.activations import Activations
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.projection import Projected
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.statistic import Statistic

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the mean square of a feature
STEPS = (1.0, 0.5, 0.25)  # of the way from the old weights to the new ones
EXACT = 1e-12  # squared error, relative to the targets, that is rounding


@dataclass(frozen=True)
class Moments:
    """Second moments of features Z (heads' outputs, then a column of ones) and targets Y: Z'Z, Z'Y and the sum of Y^2."""

    zz: Tensor
    zy: Tensor
    yy: float
    tokens: int

    def error(self, w: Tensor) -> float:
        """Squared error of ``Z w``, relative to the targets."""
        squared = self.yy - 2 * float((w * self.zy).sum()) + float(((self.zz @ w) * w).sum())
        return max(squared, 0.0) / max(self.yy, torch.finfo(torch.float64).tiny)

    def of(self, features: Tensor) -> Moments:
        """Restricted to some features."""
        return replace(self, zz=self.zz[features][:, features], zy=self.zy[features])

    def __mul__(self, weight: float) -> Moments:
        return replace(self, zz=weight * self.zz, zy=weight * self.zy, yy=weight * self.yy)


@dataclass(frozen=True)
class Fitted:
    """Weights [features, out], the step size, and the held-out error before and after."""

    weights: Tensor
    step: float
    before: float
    after: float


def output_weights(site: Projected, original: Projected | None = None) -> Tensor | None:
    """Today's [H * Dv + 1, out] of the heads that are left, in the last row how far the bias is from the original
    model's; None if unknown."""
    found = [w.double() for h in site.spec.heads if (w := site.head_weight("out", h)) is not None]
    if len(found) < site.num_heads:
        return None
    bias = site.out_bias()
    before = None if original is None else original.out_bias()
    moved = torch.zeros_like(found[0][0]) if bias is None or before is None else bias.double() - before.double()
    return torch.cat([*found, moved[None]])


def fittable_weights(site: Site) -> Tensor:
    """``output_weights``.  Raises CalibrationError if they cannot be fitted."""
    weights = output_weights(site, site.original)
    if site.activations is None or weights is None or not site.projections["out"].direct:
        raise CalibrationError(
            "fitting its output projection needs calibration data, known columns and heads that reach it unchanged",
            site=site.name,
            hint="pass calibration= to attnopt.optimize",
        )
    return weights


def with_ones(z_BHLD: Tensor, counted: Tensor) -> Tensor:
    """[tokens, H * Dv + 1] in float64."""
    z = z_BHLD.transpose(1, 2)[counted].flatten(1).double()
    return torch.cat([z, torch.ones_like(z[:, :1])], 1)


@dataclass(frozen=True)
class LayerMoments(Statistic[tuple[Moments, Moments]]):
    """Of the heads' outputs against the output of the layer in the original model: on the tokens to fit on, and on the
    held-out ones.

    ``means``: how much the mean of a sequence counts, the sum over its tokens being 1.  What is wrong with single tokens is
    noise that later layers and pools average out; what is wrong with their mean stays.
    """

    merges: ClassVar[bool] = True
    means: float = 0.0

    def measure(self, site: Site) -> tuple[Moments, Moments]:
        assert site.activations is not None
        weighted = site.activations.weighted
        parts = [[m * weight for m in _moments(now, site.spec, self.means)] for now, weight in weighted]
        fitting, held = (replace(combined(same), tokens=same[0].tokens) for same in zip(*parts, strict=True))
        return fitting, held

    def merged(self, parts: Sequence[tuple[Moments, Moments]]) -> tuple[Moments, Moments]:
        fitting, held = zip(*parts, strict=True)
        return combined(fitting), combined(held)


def _moments(now: Activations, spec: AttentionSpec, means: float) -> tuple[Moments, Moments]:
    wanted = output_weights(now.site)
    assert wanted is not None
    fitting, held = Sums(), Sums()
    counts = zip(now.counted(False), now.counted(True), strict=True)
    drifts = now.drift or (None,) * len(now.batches)
    for z, y, (fit_on, hold), drift in zip(now.outputs(spec), now.given, counts, drifts, strict=True):
        for sums, counted in ((fitting, fit_on), (held, hold)):
            features, target = with_ones(z, counted), with_ones(y, counted) @ wanted
            target = target if drift is None else target + drift[counted].double()
            sums.add(features, target)
            if means:
                sums.add(_of_means(features, counted, means), _of_means(target, counted, means), are_tokens=False)
    return fitting.moments(), held.moments()


def _of_means(x: Tensor, counted: Tensor, weight: float) -> Tensor:
    """The mean over the tokens of each sequence, with the weight of all of them times ``weight``; x [tokens, features]."""
    counts = counted.sum(1)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add(0, counted.nonzero()[:, 0], x)
    return sums * (weight / counts.clamp(min=1)).sqrt()[:, None]


class Sums:
    """Moments, batch by batch."""

    def __init__(self) -> None:
        self.zz = self.zy = torch.zeros(())
        self.yy, self.tokens = 0.0, 0

    def add(self, features: Tensor, target: Tensor, are_tokens: bool = True) -> None:
        self.zz = self.zz + features.T @ features
        self.zy = self.zy + features.T @ target
        self.yy += float((target * target).sum())
        self.tokens += len(features) if are_tokens else 0

    def moments(self) -> Moments:
        return Moments(self.zz, self.zy, self.yy, self.tokens)


def ridge(m: Moments, toward: Tensor, strength: float) -> Tensor:
    """argmin |Y - Z w|^2 + reg |w - toward|^2, with the column of ones regularized according to its scale."""
    scale = float(m.zz.diagonal()[:-1].mean()) if len(m.zz) > 1 else 1.0
    reg = strength * max(scale, torch.finfo(torch.float64).tiny)
    a = m.zz + reg * torch.eye(len(m.zz), dtype=m.zz.dtype, device=m.zz.device)
    factor, failed = torch.linalg.cholesky_ex(a)
    right = m.zy + reg * toward
    return torch.cholesky_solve(right, factor) if int(failed) == 0 else torch.linalg.lstsq(a, right).solution


def fit(fitting: Moments, held: Moments, today: Tensor, has_bias: bool, ridges: Sequence[float] = RIDGES) -> Fitted:
    """The weights with the least error on the held-out moments, among ridge solutions and steps toward them; the current
    ones if none is better.  ``has_bias``: the column of ones may be used."""
    features = torch.arange(len(today) if has_bias else len(today) - 1, device=today.device)
    some, check, start = fitting.of(features), held.of(features), today[features]
    best = Fitted(start, 0.0, check.error(start), check.error(start))
    for strength in ridges if best.before > EXACT else ():
        solution = ridge(some, start, strength)
        for step in STEPS:
            w = (1 - step) * start + step * solution
            error = check.error(w)
            if error < best.after:
                best = Fitted(w, step, best.before, error)
    whole = today.clone()
    whole[features] = best.weights
    return replace(best, weights=whole)


def out_edits(site: Site, spec: AttentionSpec, weights: Tensor) -> tuple[tuple[HeadWeights, ...], Tensor | None]:
    """``weights`` [H * Dv + 1, out] as edits of the heads of ``spec``, and the new bias if any."""
    per_head = weights[:-1].reshape(spec.num_heads, spec.value_dim, -1)
    edits = tuple(HeadWeights("out", h, w) for h, w in zip(spec.heads, per_head, strict=True))
    original = (site.original or site).out_bias()
    return edits, None if original is None else original.double() + weights[-1]


def require_tokens(site: Site, activations: Activations) -> None:
    """Raises CalibrationError if there are too few tokens to fit the output weights of a layer."""
    features = site.num_heads * site.value_dim
    if activations.tokens < features:
        raise CalibrationError(
            f"{activations.tokens} calibration tokens are fewer than the {features} features of the output projection",
            site=site.name,
            hint='pass more calibration data, or use compensate="none"',
        )


def combined(parts: Sequence[Moments]) -> Moments:
    """Of all the data together."""
    return Moments(
        sum((p.zz for p in parts[1:]), parts[0].zz),
        sum((p.zy for p in parts[1:]), parts[0].zy),
        sum(p.yy for p in parts),
        sum(p.tokens for p in parts),
    )
