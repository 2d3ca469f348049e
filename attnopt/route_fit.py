"""A router for heads, fitted in closed form to how much each head gives a token; and how much of that a route keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnopt.constant import Constant
from attnopt.errors import CalibrationError
from attnopt.head_routes import Routed
from attnopt.head_scores import output_maps
from attnopt.refit import Moments, fit, with_ones
from attnopt.site import Site


def fitted_router(site: Site, heads: Sequence[int]) -> Constant:
    """[H * D + 1, heads], float32: from the queries of a token to the norms of what these heads give it, by least squares.

    Shrinkage is chosen on held-back tokens.  Raises CalibrationError.
    """
    assert site.activations is not None
    features = site.num_heads * site.head_dim
    if site.activations.tokens < features:
        raise CalibrationError(
            f"{site.activations.tokens} calibration tokens are fewer than the {features} features of the queries",
            site=site.name,
            hint='give more calibration data, or router="query-norm"',
        )
    places = [site.spec.heads.index(h) for h in heads]
    fitting, held = (_moments(site, places, h) for h in (False, True))
    start = torch.zeros_like(fitting.zy)
    start[-1] = fitting.zy[-1] / fitting.tokens  # the mean of each head
    found = fit(fitting, held if held.tokens else fitting, start, has_bias=True)
    return Constant.of(found.weights.float())


def used_share(site: Site, route: Routed) -> float:
    """Of the norms of what all heads give, the share of those that a route uses, on held-back tokens."""
    used = total = 0.0
    for q, norms, counted in _contributions(site, held=True):
        gates = route.gates(site.spec, q, [c.tensor(q.device) for c in route.constants])
        used += float(norms[gates.transpose(1, 2)[counted]].sum())
        total += float(norms.sum())
    return used / total if total else 1.0


def _moments(site: Site, places: Sequence[int], held: bool) -> Moments:
    parts = []
    for q, norms, counted in _contributions(site, held):
        x, y = with_ones(q, counted), norms[:, places]
        parts.append((x.T @ x, x.T @ y, float((y * y).sum()), len(x)))
    zz, zy, yy, tokens = zip(*parts, strict=True)
    return Moments(sum(zz[1:], zz[0]), sum(zy[1:], zy[0]), sum(yy), sum(tokens))


def _contributions(site: Site, held: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each batch the queries [B, H, L, D]; of the tokens that count, |o_h W_o,h| [tokens, H] in float64; and which count."""
    now = site.activations
    assert now is not None
    out = output_maps(site)
    for o, operands, counted in zip(now.outputs(site.spec), now.batches, now.counted(held), strict=True):
        given = torch.einsum("nhd,hde->nhe", o.transpose(1, 2)[counted].double(), out)
        yield operands.q[:, list(site.spec.heads)], given.norm(dim=-1), counted
