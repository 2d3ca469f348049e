"""The token ids among the inputs of a model."""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.errors import CalibrationError

USUAL = "input_ids"


def token_ids(batch: CallInputs, site: str | None = None) -> Tensor:
    """The ids [B, L] of one batch: ``input_ids``, or else the first matrix of integers.  Raises CalibrationError."""
    given = batch.kwargs.get(USUAL)
    for x in [given, *pytree.tree_leaves(batch)]:
        if isinstance(x, Tensor) and not x.is_floating_point() and x.dim() == 2:
            return x
    raise CalibrationError(
        "the model has no token ids input, integers of [batch, length]", site=site, hint="choose another method"
    )


def with_ids(batch: CallInputs, ids: Tensor) -> CallInputs:
    """The same batch with other ids."""
    old = token_ids(batch)
    changed: CallInputs = pytree.tree_map(lambda x: ids if x is old else x, batch)
    return changed
