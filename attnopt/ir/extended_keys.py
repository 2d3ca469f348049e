"""Keys and values of other tokens, which an attention reads beside its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.call_tensor import CallTensor, Source, source_from_json
from attnopt.ir.head_edits import heads_told


@dataclass(frozen=True)
class ExtendedKeys:
    """``heads`` (their numbers in the trained model) read keys and values that are computed from the features of other tokens
    as those of the attention are from its own.

    ``reference``: the features, [M, C] or [B or 1, M, C].  ``tokens``: M, in the example if each call brings them.
    ``weight``: how often each token counts, above 0.  ``mask``: which of them are seen, bool [M] or [B or 1, M]; None: all.
    """

    reference: Source
    tokens: int
    heads: tuple[int, ...]
    weight: float = 1.0
    mask: Source | None = None

    @property
    def tensors(self) -> tuple[Source, ...]:
        return (self.reference, *(() if self.mask is None else (self.mask,)))

    @property
    def log_weight(self) -> float:
        """What is added to the scores of the reference."""
        return math.log(self.weight)

    def keeping(self, kept: Collection[int]) -> ExtendedKeys | None:
        """The same with the kept heads alone; None if none of them reads the reference."""
        heads = tuple(h for h in self.heads if h in kept)
        return replace(self, heads=heads) if heads else None

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference.to_json(),
            "tokens": self.tokens,
            "heads": list(self.heads),
            "weight": self.weight,
            "mask": None if self.mask is None else self.mask.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExtendedKeys:
        """The inverse of ``to_json``."""
        return cls(
            source_from_json(data["reference"]),
            int(data["tokens"]),
            tuple(map(int, data["heads"])),
            float(data["weight"]),
            None if data["mask"] is None else source_from_json(data["mask"]),
        )

    def __str__(self) -> str:
        """ "heads 0, 2 read 16 more keys with weight 0.5" """
        read = "reads" if len(self.heads) == 1 else "read"
        of = f" of {self.reference}" if isinstance(self.reference, CallTensor) else ""
        how_many = f"{self.tokens} more {'key' if self.tokens == 1 else 'keys'}{of}"
        by = "" if self.weight == 1.0 else f" with weight {self.weight:g}"
        under = "" if self.mask is None else f" under {self.mask if isinstance(self.mask, CallTensor) else 'a mask'}"
        return f"{heads_told(self.heads)} {read} {how_many}{by}{under}"


@dataclass(frozen=True)
class MoreKeys:
    """The keys and values of other tokens: ``k`` [B|1, G, M, D], ``v`` [B|1, G, M, Dv]; ``seen``, bool [B|1, M], or None for
    all."""

    k: Tensor
    v: Tensor
    seen: Tensor | None = None

    def of_batch(self, batch: int | torch.SymInt) -> MoreKeys:
        """One for each sequence."""
        k, v = (x.expand(batch, -1, -1, -1) for x in (self.k, self.v))
        return MoreKeys(k, v, self.seen)
