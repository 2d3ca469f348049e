"""A closed-form router fitted to the output norm of each head per token, and the fraction of the norm that a route keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.fit.head_scores import output_maps
from attnopt.fit.least_squares import Moments, Sums, fit, with_ones
from attnopt.ir.call_tensor import known
from attnopt.ir.constant import Constant
from attnopt.ir.head_routing import Routed
from attnopt.ir.site import Site


def fitted_router(site: Site, heads: Sequence[int]) -> Constant:
    """[H * D + 1, heads], float32: least-squares map from the queries of a token to the output norms of these heads.

    Shrinkage is chosen on held-back tokens.  Raises CalibrationError.
    """
    assert site.activations is not None
    features = site.num_heads * site.head_dim
    if site.activations.tokens < features:
        raise CalibrationError(
            f"{site.activations.tokens} calibration tokens are fewer than the {features} features of the queries",
            site=site.name,
            hint='pass more calibration data, or use router="query-norm"',
        )
    places = [site.spec.heads.index(h) for h in heads]
    fitting, held = _moments(site, places)
    start = torch.zeros_like(fitting.zy)
    start[-1] = fitting.zy[-1] / fitting.tokens  # the mean of each head
    found = fit(fitting, held if held.tokens else fitting, start, has_bias=True)
    return Constant.of(found.weights.float())


def used_share(site: Site, route: Routed) -> float:
    """The fraction of the output norm of all heads that a route uses, on held-out tokens."""
    assert site.activations is not None
    used = total = 0.0
    for (q, norms), counted in zip(_contributions(site), site.activations.counted(True), strict=True):
        gates = route.gates(site.spec, q, known(route.tensors, q.device))
        used += float(norms[counted][gates.transpose(1, 2)[counted]].sum())
        total += float(norms[counted].sum())
    return used / total if total else 1.0


def _moments(site: Site, places: Sequence[int]) -> tuple[Moments, Moments]:
    """On the tokens to fit on, and on the held-out ones."""
    assert site.activations is not None
    fitting, held = Sums(), Sums()
    counts = zip(site.activations.counted(False), site.activations.counted(True), strict=True)
    for (q, norms), (fit_on, hold) in zip(_contributions(site), counts, strict=True):
        for sums, counted in ((fitting, fit_on), (held, hold)):
            sums.add(with_ones(q, counted), norms[counted][:, places])
    return fitting.moments(), held.moments()


def _contributions(site: Site) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch the queries [B, H, L, D], and |o_h W_o,h| [B, L, H] in float64."""
    now = site.activations
    assert now is not None
    out = output_maps(site)
    for o, operands in zip(now.outputs(site.spec), now.batches, strict=True):
        given = torch.einsum("blhd,hde->blhe", o.transpose(1, 2).double(), out)
        yield operands.q[:, list(site.spec.heads)], given.norm(dim=-1)
