"""What one attention becomes: its new meaning, with the weights for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class SiteEdit:
    """A new spec, new weights for heads that stay, and a new bias of the output projection [out] where it changes."""

    spec: AttentionSpec
    edits: tuple[HeadWeights, ...] = ()
    out_bias: Tensor | None = None
