"""Where the heads of a decoder's layer stand in its cache: in slots, so that layers with other heads can have as many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.ir.operands import Operands
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.builder import Builder
from attnopt.onnx.export.write_form import heads_of

EMPTY = -1  # a slot of zeros


@dataclass(frozen=True)
class HeadSlots:
    """The place of the query or key/value head in each slot.  Query slot h reads key/value slot h // r, for one number r."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @classmethod
    def of(cls, spec: AttentionSpec) -> Self:
        """One slot for each head; where heads are shared unevenly, one key/value slot for each query head."""
        shared = range(spec.num_kv_heads) if spec.is_evenly_shared else spec.kv_of_head
        return cls(tuple(range(spec.num_heads)), tuple(shared))

    def spec(self, spec: AttentionSpec) -> AttentionSpec:
        """The attention of all slots."""
        sizes = (len(self.heads), len(self.kv_heads), spec.head_dim, spec.value_dim)
        return AttentionSpec.of(*sizes, scale=spec.scale, softcap=spec.softcap)

    def fill(self, b: Builder, spec: AttentionSpec, x: Operands[ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
        """q, k and v [B, slots, tokens, D] of the heads of ``spec``."""
        k, v = (_taken(b, of_heads, spec.num_kv_heads, self.kv_heads) for of_heads in (x.k, x.v))
        return _taken(b, x.q, spec.num_heads, self.heads), k, v

    def take(self, b: Builder, spec: AttentionSpec, made: ir.Value) -> ir.Value:
        """The heads of ``spec`` [B, H, tokens, D], of the outputs of all slots."""
        return _taken(b, made, len(self.heads), [self.heads.index(h) for h in range(spec.num_heads)])

    def scales(self, of_heads: Tensor) -> Tensor:
        """[slots, D] of key/value heads [G, D]; any scale fits zeros."""
        return torch.cat([of_heads, torch.ones_like(of_heads[:1])])[list(self.kv_heads)]


def uniform(specs: Sequence[AttentionSpec]) -> list[HeadSlots]:
    """The slots of each attention: as few key/value slots as possible, and of those forms the one with the fewest queries."""
    readers = [_readers(spec) for spec in specs]
    largest = max(len(group) for groups in readers for group in groups)
    found = [_with_ratio(readers, r) for r in range(1, largest + 1)]
    return min(found, key=lambda slots: (len(slots[0].kv_heads), len(slots[0].heads)))


def _with_ratio(readers: Sequence[Sequence[Sequence[int]]], r: int) -> list[HeadSlots]:
    """At most r query heads to a key/value slot: a head with more readers fills several."""
    cut = [[(g, own[i : i + r]) for g, own in enumerate(groups) for i in range(0, len(own), r)] for groups in readers]
    most = max(map(len, cut))
    return [_slots_of([*parts, *[(EMPTY, [])] * (most - len(parts))], r) for parts in cut]


def _slots_of(parts: Sequence[tuple[int, Sequence[int]]], r: int) -> HeadSlots:
    heads = [h for _, own in parts for h in (*own, *[EMPTY] * (r - len(own)))]
    return HeadSlots(tuple(heads), tuple(g for g, _ in parts))


def _readers(spec: AttentionSpec) -> list[list[int]]:
    """The places of the query heads that read each key/value head."""
    return [[h for h, g in enumerate(spec.kv_of_head) if g == n] for n in range(spec.num_kv_heads)]


def _taken(b: Builder, x: ir.Value, count: int, places: Sequence[int]) -> ir.Value:
    """Of ``count`` heads."""
    if list(places) == list(range(count)):
        return x
    if EMPTY in places:  # the last one, of zeros
        x = b.op("Pad", x, b.ints(0, 0, 0, 0, 0, 1, 0, 0), b.constant(np.asarray(0.0, np.float32)))
    return heads_of(b, x, places)
