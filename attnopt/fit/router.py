"""A closed-form router fitted to the output norm of each head per token, and the fraction of the norm that a route keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.fit.head_scores import output_maps
from attnopt.fit.least_squares import Moments, Sums, fit, with_ones
from attnopt.ir.call_tensor import known
from attnopt.ir.constant import Constant
from attnopt.ir.head_routing import Routed, SoftGates
from attnopt.ir.site import Site

SHARPNESS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of a softmax over scores, which are norms of outputs; 0: all heads alike


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


def fitted_gates(site: Site, route: Routed) -> SoftGates:
    """The gates with which the used heads give what comes nearest to the output of all heads.

    The two factors are least squares for each sharpness of the softmax, of which the best on held-out tokens is taken."""
    assert site.activations is not None
    constants = known(route.tensors)
    fits = {sharpness: (_Quadratic(), _Quadratic()) for sharpness in SHARPNESS}
    counts = zip(site.activations.counted(False), site.activations.counted(True), strict=True)
    for (q, given_BLHE), masks in zip(_given(site), counts, strict=True):
        on = [c.to(q.device) for c in constants]
        everything = given_BLHE.sum(2)
        for sharpness, sums in fits.items():
            kinds = (SoftGates(1.0, 0.0, sharpness), SoftGates(0.0, 1.0, sharpness))
            weights = [replace(route, soft=kind).weights(site.spec, q, on).transpose(1, 2).double() for kind in kinds]
            parts = [torch.einsum("blh,blhe->ble", w, given_BLHE) for w in weights]
            for quadratic, counted in zip(sums, masks, strict=True):
                quadratic.add(torch.stack([*parts, everything])[:, counted])
    found = {sharpness: fit.solved() for sharpness, (fit, _) in fits.items()}
    on_held = {s: (held if held.tokens else fit).error(found[s]) for s, (fit, held) in fits.items()}
    best = min(SHARPNESS, key=lambda s: on_held[s])
    return SoftGates(*found[best], best)


class _Quadratic:
    """The squared error of factors of two parts against a whole, summed over tokens."""

    def __init__(self) -> None:
        self.tokens, self.products = 0, torch.zeros(3, 3, dtype=torch.float64)

    def add(self, three_NTE: Tensor) -> None:
        """Both parts and the whole."""
        self.tokens += three_NTE.shape[1]
        flat = three_NTE.flatten(1).cpu()
        self.products += flat @ flat.T

    def solved(self) -> tuple[float, float]:
        """1 for a part that gives nothing."""
        gram, right = self.products[:2, :2], self.products[:2, 2]
        gives = gram.diagonal() > 0
        factors = torch.ones(2, dtype=torch.float64)
        factors[gives] = torch.linalg.lstsq(gram[gives][:, gives], right[gives][:, None], driver="gelsd").solution[:, 0]
        return float(factors[0]), float(factors[1])

    def error(self, factors: tuple[float, float]) -> float:
        residual = torch.tensor([*factors, -1.0], dtype=torch.float64)
        return float(residual @ self.products @ residual)


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
    for q, given in _given(site):
        yield q, given.norm(dim=-1)


def _given(site: Site) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch the queries [B, H, L, D], and o_h W_o,h [B, L, H, E] in float64."""
    now = site.activations
    assert now is not None
    out = output_maps(site)
    for o, operands in zip(now.outputs(site.spec), now.batches, strict=True):
        yield operands.q[:, list(site.spec.heads)], torch.einsum("blhd,hde->blhe", o.transpose(1, 2).double(), out)
