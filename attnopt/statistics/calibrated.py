"""What statistics of one attention read: its activations, block after block, and vectors of tokens that count."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.ir.activations import Activations
from attnopt.ir.semantics import heads_of
from attnopt.ir.site import Site
from attnopt.ir.weight_rows import WeightRows, weight_rows


def calibrated(site: Site) -> Activations:
    """Raises CalibrationError for a site without calibration data."""
    if site.activations is None or site.activations.tokens == 0:
        raise CalibrationError("there is no calibration data for it", site=site.name, hint="pass calibration batches")
    return site.activations


def rows_of(site: Site) -> Iterator[WeightRows]:
    """The attention weights of all queries that count.  Raises CalibrationError."""
    return weight_rows(calibrated(site), site.spec)


def outputs_of(site: Site) -> Iterator[Tensor]:
    """For each batch the heads' outputs of the tokens that count, [N, H, Dv] in float64."""
    now = calibrated(site)
    for z, t in zip(now.outputs(site.spec), now.batches, strict=True):
        yield z.transpose(1, 2)[t.real].double()


def last_outputs(site: Site) -> list[Tensor]:
    """For each batch the heads' outputs at the last token of each sequence, [B, H, Dv] in float64."""
    now = calibrated(site)
    return [
        z.transpose(1, 2)[torch.arange(len(z), device=z.device), last_tokens(t.real)].double()
        for z, t in zip(now.outputs(site.spec), now.batches, strict=True)
    ]


def last_tokens(real_BL: Tensor) -> Tensor:
    """[B]: the place of the last token that is no padding."""
    length = real_BL.shape[1]
    return length - 1 - real_BL.flip(1).long().argmax(1)


def sequences_of(site: Site, role: str) -> Iterator[Tensor]:
    """For each sequence what heads read of the tokens that count: queries "q", keys "k" or values "v", [N, H, D] in float64."""
    now = calibrated(site)
    for t, everything in zip(now.operands(site.spec), now.batches, strict=True):
        x = t.q if role == "q" else heads_of(site.spec, t.k if role == "k" else t.v)
        counted = everything.real if role == "q" else everything.seen
        for own, counts in zip(x.transpose(1, 2), counted, strict=True):
            yield own[counts].double()
