"""Tensors of heads as integers, with a range for each head of each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec

BITS = (8, 4)


@dataclass(frozen=True)
class HeadSizes:
    """How tensors of the heads of an attention are recognised: by the number of heads and the size of one."""

    heads: frozenset[int]  # H and G
    sizes: frozenset[int]  # D and Dv
    widths: frozenset[int]  # of all heads together, as projections give and take them

    @classmethod
    def of(cls, spec: AttentionSpec) -> Self:
        heads, sizes = {spec.num_heads, spec.num_kv_heads}, {spec.head_dim, spec.value_dim}
        return cls(frozenset(heads), frozenset(sizes), frozenset(h * d for h in heads for d in sizes if h > 1))

    def within(self, shape: torch.Size) -> tuple[int, ...] | None:
        """The axes inside one head of one sequence; None if there is no axis of heads: [B, H, L, S or D], [B, L, H, D], and
        [B * H, L, S or D], as products of batches have it."""
        if len(shape) == 4 and shape[1] in self.heads:
            return (2, 3)
        if len(shape) == 4 and shape[2] in self.heads and shape[3] in self.sizes:
            return (1, 3)
        if len(shape) != 3 or shape[2] in self.widths or self.sizes.isdisjoint(shape[1:]):
            return None
        return (1, 2) if any(shape[0] % h == 0 for h in self.heads if h > 1) else None


@dataclass(frozen=True)
class Packed:
    """``low + step * codes``; of 4 bits, two codes share a byte."""

    codes: Tensor
    low: Tensor
    step: Tensor
    shape: torch.Size
    dtype: torch.dtype
    bits: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes

    def tensor(self) -> Tensor:
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten()[: self.shape.numel()].reshape(self.shape)
        return torch.addcmul(self.low, codes.to(self.step.dtype), self.step).to(self.dtype)


def pack(t: Tensor, sizes: HeadSizes, bits: int) -> Packed | None:
    """None if ``t`` has no heads, or numbers that are not finite."""
    axes = sizes.within(t.shape)
    if axes is None or not t.is_floating_point() or not t.numel():
        return None
    with torch.no_grad():
        wide = t.detach().to(torch.promote_types(t.dtype, torch.float32))
        low, high = wide.amin(axes, keepdim=True), wide.amax(axes, keepdim=True)
        step = (high - low) / (2**bits - 1)
        if not bool(step.isfinite().all()):
            return None
        codes = ((wide - low) / step.masked_fill(step == 0, 1.0)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        if bits == 4:
            flat = codes.flatten()
            flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
            codes = flat[::2] | (flat[1::2] << 4)
    return Packed(codes, low, step, t.shape, t.dtype, bits)
