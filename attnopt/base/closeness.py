"""The one comparison of tensors that everything uses, with tolerances by dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnopt.base.containers import tensors_in

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ROOM = 10.0  # tolerance multiple for the output of a whole model, or another runtime's order of sums
PIECE = 1 << 20  # elements that are compared at a time


def tensors(output: object) -> list[Tensor]:
    """Every tensor in a model's output of any structure, including those in caches and other objects."""
    return tensors_in(output)


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of the tensor it is in (but at least to 1).

    Infinite if shapes, the number of tensors, integers, or the positions of NaN and infinities differ.
    """
    if len(got) != len(want):
        return math.inf
    return max((_difference(g, w) for g, w in zip(got, want, strict=True)), default=0.0)


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if torch.equal(got, want) else math.inf
    worst, largest = 0.0, 1.0
    for g, w in _pieces(got, want):
        finite = torch.isfinite(w)
        if not torch.equal(torch.isfinite(g), finite):
            return math.inf
        if not finite.all():
            if not torch.equal(g[~finite].nan_to_num(0.5), w[~finite].nan_to_num(0.5)):
                return math.inf
            g, w = g[finite], w[finite]
        if w.numel():
            g, w = _wide(g), _wide(w)
            worst, largest = max(worst, float((g - w).abs().max())), max(largest, float(w.abs().max()))
    return worst / largest


def squared_distance(got: Tensor, want: Tensor) -> float:
    """Sum of squared differences, in double precision."""
    return sum(float((_wide(g) - _wide(w)).abs().square().sum()) for g, w in _pieces(got, want))


def agreement(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(cosine, distance relative to the norm of ``want``) of two tensors of one shape; two of zeros agree."""
    product = own = size = apart = 0.0
    for piece in _pieces(got, want):
        g, w = map(_wide, piece)
        product, apart = product + float((g * w).sum()), apart + float((g - w).square().sum())
        own, size = own + float(g.square().sum()), size + float(w.square().sum())
    if own == 0 or size == 0:
        return (1.0, 0.0) if apart == 0 else (0.0, 1.0 if size else math.inf)
    return product / math.sqrt(own * size), math.sqrt(apart / size)


def squared_difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Sum of squared differences over floating-point tensors, relative to the squared norm of the expected ones."""
    return sum(_squared_difference(g, w) for g, w in zip(got, want, strict=True) if w.is_floating_point())


def _squared_difference(got: Tensor, want: Tensor) -> float:
    apart = size = 0.0
    for piece in _pieces(got, want):
        g, w = map(_wide, piece)
        apart, size = apart + float((g - w).square().sum()), size + float(w.square().sum())
    return apart / max(size, 1e-300)


def _pieces(got: Tensor, want: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The two in chunks, so the logits of a language model are never all in double precision at once."""
    g, w = got.reshape(-1), want.reshape(-1)
    return ((g[i : i + PIECE], w[i : i + PIECE]) for i in range(0, len(w), PIECE))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def tolerance(outputs: Sequence[Tensor]) -> float:
    """What rounding may explain, for the least precise dtype among the outputs."""
    dtypes = (t.dtype.to_real() if t.is_complex() else t.dtype for t in outputs)
    return max((TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)
