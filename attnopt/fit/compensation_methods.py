"""The compensations for lost heads, by their names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.registry import Registry
from attnopt.fit.block_obs import surgeon_of
from attnopt.fit.least_squares import (
    RIDGES,
    LayerMoments,
    combined,
    fit,
    fittable_weights,
    out_edits,
    output_weights,
    require_tokens,
)
from attnopt.ir.blame import blamed, fault
from attnopt.ir.compensation import Compensation
from attnopt.ir.head_edits import constant_heads
from attnopt.ir.interfaces import Rewrite
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.spec_rules import broken_rules

KIND = "compensation"


class Nothing(Compensation):
    """The output projection keeps its weights."""

    name: ClassVar[str] = "none"
    channels: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()
    needs_calibration: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    def compensate(self, site: Site, spec: AttentionSpec) -> Rewrite:
        return Rewrite(spec)

    def error(self, site: Site, heads: Sequence[int]) -> float:
        return surgeon_of(site).error_unfitted(_places(site, heads))


class Bias(Compensation):
    """Add the mean output of the removed heads to the output bias (FLAP, arXiv:2312.11983)."""

    name: ClassVar[str] = "bias"

    def compensate(self, site: Site, spec: AttentionSpec) -> Rewrite:
        bias = site.out_bias()
        if bias is None:
            return Rewrite(spec, notes=("the output projection has no bias, so nothing was compensated",))
        features = _features(site, _reaching(spec))
        left = fittable_weights(site)[features]
        both = combined([m.of(features) for m in LayerMoments().of(site)])
        wrong = (both.zy[-1] - both.zz[-1] @ left) / both.zz[-1, -1]
        return Rewrite(
            spec,
            out_bias=bias.double() + wrong,
            notes=("the mean output of the removed heads was added to the output bias",),
        )

    def error(self, site: Site, heads: Sequence[int]) -> float:
        return surgeon_of(site).error_unfitted(_places(site, heads), mean=True)


@dataclass(frozen=True)
class LeastSquares(Compensation):
    """Fit the output projection to the layer output in the original model (OSSCAR, arXiv:2403.12983).

    ``means``: as of ``LayerMoments``; ``ridges``: strengths of the shrinkage, of which held-out tokens choose."""

    name: ClassVar[str] = "least-squares"
    merges: ClassVar[bool] = True
    means: float = 0.0
    ridges: tuple[float, ...] = RIDGES

    def compensate(self, site: Site, spec: AttentionSpec) -> Rewrite:
        if not _reaching(spec):
            return Bias().compensate(site, spec)
        features, today = _features(site, spec.heads), fittable_weights(site)
        assert site.activations is not None
        require_tokens(site, site.activations)
        fitting, held = (m.of(features) for m in LayerMoments(self.means).of(site))
        has_bias, judging = site.out_bias() is not None, held if held.tokens else fitting
        found = fit(fitting, judging, today[features], has_bias, self.ridges)
        note = (
            f"least squares on {fitting.tokens} tokens: layer error on {held.tokens} held-out tokens "
            f"{found.before:.3f} -> {found.after:.3f} (step {found.step:g})"
        )
        if not found.step:
            return Rewrite(spec, notes=(note,))
        return Rewrite(spec, *out_edits(site, spec, found.weights), (note,))

    def error(self, site: Site, heads: Sequence[int]) -> float:
        return surgeon_of(site).error(_places(site, heads))


COMPENSATIONS = Registry(
    "attnopt.compensations",
    KIND,
    Compensation,  # type: ignore[type-abstract]
    {kind.name: kind for kind in (Nothing, Bias, LeastSquares)},
    lambda cls: getattr(cls, "name", None),
)


def chosen(name: str | None, site: Site) -> Compensation:
    """By its name, or the best for what is known of the site."""
    able = site.activations is not None and site.knows("out")
    return COMPENSATIONS.make(name or ("least-squares" if able else "none"))


def compensated(how: Compensation, site: Site, spec: AttentionSpec) -> Rewrite:
    """The rewrite of ``site`` to ``spec``.  Raises CalibrationError, PluginError."""
    with blamed(how, KIND, "compensate", site.name):
        made = how.compensate(site, spec)
    if not isinstance(made, Rewrite):
        raise fault(how, KIND, f"compensate returned {type(made).__name__}, expected a Rewrite", site.name)
    if made.spec != spec:
        raise fault(how, KIND, f"compensate returned the spec {made.spec}, expected {spec}", site.name)
    if (broken := next(broken_rules(site, made), None)) is not None:
        raise fault(how, KIND, broken, site.name)
    return made


def error_without(how: Compensation, site: Site, spec: AttentionSpec) -> float:
    """The squared error of the layer with ``spec``, relative to its output.  Raises CalibrationError, PluginError."""
    with blamed(how, KIND, "error", site.name):
        known = how.error(site, _reaching(spec))
    if known is not None:
        if not isinstance(known, (int, float)) or not math.isfinite(known):
            raise fault(how, KIND, f"error returned {known!r}, expected a finite number or None", site.name)
        return known
    weights, heads = _weights(site, compensated(how, site, spec)), _reaching(spec)
    left = combined(LayerMoments().of(site)).of(_features(site, heads))
    return left.error(weights[_features(replace(site, spec=spec), heads)])


def held_out_error(site: Site, made: Rewrite) -> float:
    """The same for new output weights of all heads of ``site``, on held-out tokens if there are some."""
    fitting, held = LayerMoments().of(site)
    return (held if held.tokens else fitting).error(_weights(site, made))


def _weights(site: Site, made: Rewrite) -> Tensor:
    weights = output_weights(site.edited(made), site.original)
    assert weights is not None
    return weights


def _reaching(spec: AttentionSpec) -> tuple[int, ...]:
    """The heads whose output is not known to be zero."""
    silent = {h for h, value in constant_heads(spec.after).items() if not bool(value.any())}
    return tuple(h for h in spec.heads if h not in silent)


def _places(site: Site, heads: Sequence[int]) -> list[int]:
    return [site.spec.heads.index(h) for h in heads]


def _features(site: Site, heads: Sequence[int]) -> Tensor:
    """The columns of ``heads``, a subset of the site's heads, and of the ones."""
    Dv = site.value_dim
    return torch.tensor([*(p * Dv + i for p in _places(site, heads) for i in range(Dv)), site.num_heads * Dv])
