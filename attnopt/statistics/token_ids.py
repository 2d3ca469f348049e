"""The token ids among the inputs of a model."""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.errors import CalibrationError

USUAL = "input_ids"


def token_ids(batch: CallInputs, shape: tuple[int, int] | None = None, site: str | None = None) -> Tensor:
    """The ids [B, L] of one batch, of ``shape`` if given: ``input_ids``, or else the first matrix of integers.  Raises
    CalibrationError."""
    for x in [batch.kwargs.get(USUAL), *pytree.tree_leaves(batch)]:
        if (
            isinstance(x, Tensor)
            and not x.is_floating_point()
            and x.dim() == 2
            and tuple(x.shape) == (shape or x.shape)
        ):
            return x
    told = "[batch, length]" if shape is None else f"shape {shape}"
    raise CalibrationError(f"the model has no token ids input of {told}", site=site, hint="choose another method")


def with_ids(batch: CallInputs, ids: Tensor) -> CallInputs:
    """The same batch with other ids."""
    old = token_ids(batch)
    changed: CallInputs = pytree.tree_map(lambda x: ids if x is old else x, batch)
    return changed
