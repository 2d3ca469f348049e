"""Norms at the scale that they have for one tensor, which makes them linear in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.graph.ops import named

LAYER_NORM, RMS_NORM = named("layer_norm"), named("rms_norm")


def layer_norm(
    part: Tensor,
    whole: Tensor,
    sizes: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    """What torch's ``layer_norm`` of ``whole`` makes of a part of it, and the bias."""
    axes = tuple(range(-len(sizes), 0))
    scale = (whole.var(axes, keepdim=True, unbiased=False) + eps).rsqrt()
    made = (part - part.mean(axes, keepdim=True)) * scale
    made = made if weight is None else made * weight
    return made if bias is None else made + bias


def rms_norm(
    part: Tensor, whole: Tensor, sizes: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """What torch's ``rms_norm`` of ``whole`` makes of a part of it."""
    axes = tuple(range(-len(sizes), 0))
    small = torch.finfo(whole.dtype).eps if eps is None else eps
    made = part * (whole.square().mean(axes, keepdim=True) + small).rsqrt()
    return made if weight is None else made * weight
