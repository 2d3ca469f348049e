"""New weights of one head."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class HeadWeights:
    """New weights of one head in one projection: ``weight`` [D, in] and ``bias`` [D] or None.

    For "out" the weight is [Dv, out]; its bias does not belong to a head: see ``Rewrite.out_bias``.

    ``head`` is an original number (of a K/V head for "k" and "v").
    """

    role: str
    head: int
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(default=None, repr=False)
