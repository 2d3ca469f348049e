"""What the heads that remain do for those that are gone: a new output bias, or a new output projection."""

from __future__ import annotations

import torch

from attnopt.activations import Activations
from attnopt.errors import CalibrationError
from attnopt.obs import Surgeon
from attnopt.refit import combined, fit, moments, out_edits, output_weights, require_tokens
from attnopt.rewriting import Rewrite
from attnopt.site import Site
from attnopt.spec import AttentionSpec


def surgeon_of(site: Site) -> Surgeon:
    """The least squares of the site's layer over all calibration data."""
    activations, today = _learned(site)
    both = combined([moments(activations, site.spec, held) for held in (False, True)])
    return Surgeon(both, today, site.num_heads, site.value_dim, site.out_bias() is not None)


def bias_for(site: Site, spec: AttentionSpec) -> Rewrite:
    """The heads of ``spec`` as they are, the mean of what the others gave in the bias (FLAP, arXiv:2312.11983)."""
    bias = site.out_bias()
    if bias is None:
        return Rewrite(spec, notes=("the output projection has no bias, nothing was compensated",))
    now, _ = _learned(site)
    both = combined([moments(now, spec, held) for held in (False, True)])
    left = _weights_of(site, spec)
    wrong = (both.zy[-1] - both.zz[-1] @ left) / both.zz[-1, -1]
    return Rewrite(
        spec, out_bias=_as(bias.double() + wrong, bias), notes=("the mean of what is gone is in the output bias",)
    )


def refitted(
    site: Site, spec: AttentionSpec, now: Activations | None = None, start: torch.Tensor | None = None
) -> Rewrite:
    """The output projection of the heads of ``spec`` fitted to what the layer gave in the original model.

    ``now``: what the site computes, where its weights are others by now; ``start``: the output weights to start from.
    """
    known, _ = _learned(site)
    require_tokens(site, known)
    now = now or known
    start = _weights_of(site, spec) if start is None else start
    fitting, held = (moments(now, spec, h) for h in (False, True))
    found = fit(fitting, held if held.tokens else fitting, start, site.out_bias() is not None)
    edits, bias = out_edits(site, spec, found.weights)
    note = (
        f"least squares on {fitting.tokens} tokens: error of the layer on {held.tokens} held-back ones "
        f"{found.before:.3f} -> {found.after:.3f} (step {found.step:g})"
    )
    return Rewrite(spec, edits, bias, (note,))


def _learned(site: Site) -> tuple[Activations, torch.Tensor]:
    weights = output_weights(site)
    if site.activations is None or weights is None:
        raise CalibrationError(
            "its output projection cannot be fitted without calibration data and known columns",
            site=site.name,
            hint="give calibration= to attnopt.optimize",
        )
    return site.activations, weights


def _weights_of(site: Site, spec: AttentionSpec) -> torch.Tensor:
    """Today's output weights of the heads of ``spec``, and a row of zeros."""
    _, weights = _learned(site)
    wanted = [i for h in spec.heads for i in _rows(site, h)]
    return weights[[*wanted, len(weights) - 1]]


def _rows(site: Site, head: int) -> range:
    at = site.spec.heads.index(head) * site.value_dim
    return range(at, at + site.value_dim)


def _as(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return new.to(old.dtype)
