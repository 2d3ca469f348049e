"""Absorbable transforms: linear maps of head features that can be folded into the projection, found by trial.

With ``M`` [D, D], the rows of a head in the projection become ``M' W`` and its bias ``M' b``.  If the features reach the
core directly from the projection (or scaled), the core then sees ``x M`` for any M.  After rotary positions this holds
only for maps that act on each rotated pair of features as one complex number; after a norm, for none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.base.closeness import tolerance
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic

Pairs = tuple[tuple[int, int], ...]
ROUNDING = 3.0  # how much more than one operator's rounding a whole projection may show


@dataclass(frozen=True)
class Mixing:
    """``pairs``: None if any map can be folded; otherwise the pairs of features that act as complex numbers."""

    pairs: Pairs | None = None


@dataclass(frozen=True)
class ScoreMixing(Statistic[Mixing | None]):
    """The maps that can be folded into both the query and the key projection; None if there are none."""

    def measure(self, site: Site) -> Mixing | None:
        for candidate in (None, *_pairings(site.head_dim)):
            maps = _trial(candidate, site.head_dim)
            if all(_moves(site, role, maps) for role in ("q", "k")):
                return Mixing(candidate)
        return None


@dataclass(frozen=True)
class ValueMixing(Statistic[bool]):
    """Whether any map can be folded into the value projection."""

    def measure(self, site: Site) -> bool:
        return _moves(site, "v", _trial(None, site.value_dim))


def is_linear(site: Site) -> bool:
    """Whether maps of keys, queries and values can be folded into their projections."""
    return ScoreMixing().of(site) is not None and ValueMixing().of(site)


def edit(site: Site, role: str, head: int, maps: Mapping[int, Tensor]) -> HeadWeights:
    """Head ``head`` of ``role`` as the sum of today's ``x_g M_g`` over the heads g of ``maps``."""
    weights = [(site.head_weight(role, g), site.head_bias(role, g), m) for g, m in maps.items()]
    made: list[Tensor] = []
    bias: list[Tensor] = []
    for w, b, m in weights:
        assert w is not None
        m = m.to(w.device)
        made.append(m.T @ w.double())
        if b is not None:
            bias.append(m.T @ b.double())
    return HeadWeights(role, head, sum(made[1:], made[0]), sum(bias[1:], bias[0]) if bias else None)


def as_real(pairs: Sequence[tuple[int, int]], values: Tensor, size: int) -> Tensor:
    """The map [D, D] of row vectors that multiplies the pair of features n, read as a complex number, by ``values[n]``."""
    m = torch.zeros(size, size, dtype=torch.float64)
    for (i, j), z in zip(pairs, values.tolist(), strict=True):
        m[i, i] = m[j, j] = z.real
        m[i, j], m[j, i] = z.imag, -z.imag
    return m


def _moves(site: Site, role: str, maps: Tensor) -> bool:
    now = site.activations
    p = site.projections.get(role)
    if now is None or p is None or p.rows is None:
        return False
    heads = site.spec.heads if role == "q" else site.spec.kv_heads
    there = now.edited([edit(site, role, h, {h: maps}) for h in heads], first_alone=True)
    wanted: Tensor = getattr(now.batches[0], role)[:, list(heads)].double() @ maps
    got: Tensor = getattr(there.batches[0], role)[:, list(heads)]
    apart = float((got.double() - wanted).abs().max())
    return apart <= ROUNDING * tolerance([got]) * float(wanted.abs().max())


def _trial(pairs: Pairs | None, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    if pairs is None:
        m = torch.randn(size, size, generator=generator, dtype=torch.float64) / math.sqrt(size)
        return m + torch.eye(size, dtype=torch.float64)
    z = torch.randn(len(pairs), generator=generator, dtype=torch.complex128)
    return as_real(pairs, z, size)


def _pairings(size: int) -> list[Pairs]:
    """Halves or neighbours, of all features or of the rotated first half or quarter."""
    found: list[Pairs] = []
    for part in (size, size // 2, size // 4):
        if part < 2 or part % 2 or size % 2:
            continue
        rest = tuple((i, i + 1) for i in range(part, size, 2))
        found.append((*((i, i + part // 2) for i in range(part // 2)), *rest))
        found.append((*((i, i + 1) for i in range(0, part, 2)), *rest))
    return list(dict.fromkeys(found))
