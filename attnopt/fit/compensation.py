"""Compensation for removed heads: a new output bias, or a new output projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.fit.block_obs import Surgeon
from attnopt.fit.least_squares import combined, fit, moments, out_edits, output_weights, require_tokens
from attnopt.ir.activations import Activations
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.interfaces import Rewrite
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec


def surgeon_of(site: Site) -> Surgeon:
    """The least squares of the site's layer over all calibration data."""
    activations, today = _learned(site)
    return Surgeon(
        combined(moments(activations, site.spec)), today, site.num_heads, site.value_dim, site.out_bias() is not None
    )


def bias_for(site: Site, spec: AttentionSpec, heads: Sequence[int] | None = None) -> Rewrite:
    """Keep the ``heads`` (of ``spec`` by default) and add the mean output of the others to the bias (FLAP,
    arXiv:2312.11983)."""
    heads = spec.heads if heads is None else heads
    bias = site.out_bias()
    if bias is None:
        return Rewrite(spec, notes=("the output projection has no bias, so nothing was compensated",))
    now, _ = _learned(site)
    both = combined([m.of(_features(site, heads)) for m in moments(now, site.spec)])
    left = _weights_of(site, heads)
    wrong = (both.zy[-1] - both.zz[-1] @ left) / both.zz[-1, -1]
    return Rewrite(
        spec,
        out_bias=bias.double() + wrong,
        notes=("the mean output of the removed heads was added to the output bias",),
    )


@dataclass(frozen=True)
class Refitted:
    """``weights`` [H * Dv + 1, out] of the heads of ``spec``; ``error``: of the layer on held-back data."""

    site: Site
    spec: AttentionSpec
    weights: Tensor
    error: float
    note: str

    def rewrite(self, name: str, edits: Sequence[HeadWeights] = (), notes: Sequence[str] = ()) -> Rewrite:
        """With the edits and notes of the pass ``name``."""
        out, bias = out_edits(self.site, self.spec, self.weights)
        return Rewrite(self.spec, (*edits, *out), bias, (*notes, f"{name}: {self.note}"))


def refitted(site: Site, spec: AttentionSpec, now: Activations | None = None, start: Tensor | None = None) -> Refitted:
    """Fit the output projection of the heads of ``spec`` to the layer output in the original model.

    ``now``: the current activations of the site, if its weights have changed; ``start``: the initial output weights.
    Raises CalibrationError.
    """
    known, _ = _learned(site)
    require_tokens(site, known)
    start = _weights_of(site, spec.heads) if start is None else start
    fitting, held = (
        moments(now, spec) if now else [m.of(_features(site, spec.heads)) for m in moments(known, site.spec)]
    )
    found = fit(fitting, held if held.tokens else fitting, start, site.out_bias() is not None)
    note = (
        f"least squares on {fitting.tokens} tokens: layer error on {held.tokens} held-out tokens "
        f"{found.before:.3f} -> {found.after:.3f} (step {found.step:g})"
    )
    return Refitted(site, spec, found.weights, found.after, note)


def _learned(site: Site) -> tuple[Activations, Tensor]:
    weights = output_weights(site, site.original)
    if site.activations is None or weights is None or not site.projections["out"].direct:
        raise CalibrationError(
            "fitting its output projection needs calibration data, known columns and heads that reach it unchanged",
            site=site.name,
            hint="pass calibration= to attnopt.optimize",
        )
    return site.activations, weights


def _weights_of(site: Site, heads: Sequence[int]) -> Tensor:
    """Today's output weights of ``heads``, and the row of the bias."""
    _, weights = _learned(site)
    return weights[_features(site, heads)]


def _features(site: Site, heads: Sequence[int]) -> Tensor:
    """The columns of ``heads``, a subset of the site's heads, and of the ones."""
    Dv = site.value_dim
    places = [site.spec.heads.index(h) for h in heads]
    return torch.tensor([*(p * Dv + i for p in places for i in range(Dv)), site.num_heads * Dv])
