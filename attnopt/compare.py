"""The one comparison of tensors that everything uses, with tolerances by dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of a model's output, whatever its structure."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of the tensor it is in (but at least to 1).

    Infinite where shapes, the number of tensors, integers, or the places of NaN and infinities differ.
    """
    if len(got) != len(want):
        return math.inf
    return max((_difference(g, w) for g, w in zip(got, want, strict=True)), default=0.0)


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if torch.equal(got, want) else math.inf
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite) or not torch.equal(
        got[~finite].nan_to_num(0.5), want[~finite].nan_to_num(0.5)
    ):
        return math.inf
    if not finite.any():
        return 0.0
    wide = torch.complex128 if want.is_complex() else torch.float64
    g, w = got[finite].to(wide), want[finite].to(wide)
    return float((g - w).abs().max()) / max(1.0, float(w.abs().max()))


def tolerance(outputs: Sequence[Tensor]) -> float:
    """What rounding may explain, for the least precise dtype among the outputs."""
    return max((TOLERANCE.get(t.dtype, 0.0) for t in outputs), default=0.0)
