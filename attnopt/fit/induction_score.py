"""Induction heads: attention to the successor of an earlier occurrence of the query token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.errors import CalibrationError
from attnopt.ir.site import Site


def retrieval(site: Site, batches: Sequence[CallInputs]) -> tuple[float, ...]:
    """Mean attention from each token to those that followed its earlier occurrences (arXiv:2209.11895), over the tokens
    that have any.  Raises CalibrationError if the model takes no token ids."""
    assert site.activations is not None
    total, rows = torch.zeros(site.num_heads, dtype=torch.float64), 0
    seen = site.activations
    for p, operands, batch in zip(seen.weights(site.spec), seen.batches, batches, strict=True):
        ids = _token_ids(site, batch, p)
        follows = torch.zeros(ids.shape[0], ids.shape[1], ids.shape[1], dtype=torch.bool)
        follows[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
        follows &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        counted = follows.any(-1) & operands.real
        mass = (p.double() * follows[:, None]).sum(-1).transpose(1, 2)[counted]
        total += mass.sum(0)
        rows += len(mass)
    if not rows:
        raise CalibrationError("no token occurs twice in the calibration data", site=site.name, hint="use longer texts")
    return tuple((total / rows).tolist())


def _token_ids(site: Site, batch: CallInputs, p: Tensor) -> Tensor:
    B, L, S = p.shape[0], p.shape[2], p.shape[3]
    for x in pytree.tree_leaves(batch):
        if isinstance(x, Tensor) and not x.is_floating_point() and tuple(x.shape) == (B, L) and L == S:
            return x
    raise CalibrationError(
        f"the model has no token ids input of shape {(B, L)}", site=site.name, hint="choose another method"
    )
