"""The weights of an attention without a softmax: scores that may fade with distance, and may be divided by their sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.base.bit_table import stretched


@dataclass(frozen=True)
class LinearWeights:
    """The weight of query i and key j is their score times ``exp(-rate * (i - j))``; the last query is at the last key.

    ``rates``: of each head, at least 0 (retention, arXiv:2307.08621; Lightning Attention, arXiv:2401.04658); empty if nothing
    fades.
    ``divides``: the weights of a query are divided by their sum over the keys that it sees (arXiv:2006.16236), by its absolute
    value if ``absolute``, by ``least`` if that is more, with ``added`` to it; no gradient flows to it if it is ``detached``.
    A query that sees no key gives zeros.
    """

    rates: tuple[float, ...] = ()
    divides: bool = False
    added: float = 0.0
    least: float | None = None
    absolute: bool = False
    detached: bool = False

    def of_scores(self, s_BHLS: Tensor, seen: Tensor | None) -> Tensor:
        """The weights; ``seen``, bool, broadcasts to the scores, None: every query sees every key."""
        L, S = s_BHLS.shape[2:]
        w = s_BHLS
        if self.rates:
            i = torch.arange(L, device=w.device) + (S - L)
            w = w * self.faded(i[:, None] - torch.arange(S, device=w.device), w.dtype)
        if seen is not None:
            w = w.masked_fill(~seen, 0.0)
        if not self.divides:
            return w
        total = self.divisor(w.sum(-1, keepdim=True))
        return w / (total if seen is None else total.masked_fill(~seen.any(-1, keepdim=True), 1.0))

    def faded(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """[1, H, *]: what is left of a weight at ``distance`` [*], 1 at those below 0."""
        steps = distance.clamp(min=0).to(dtype)
        rates = stretched(((rate, 1) for rate in self.rates), distance.device, dtype)
        return torch.exp(-rates.reshape(1, -1, *(1 for _ in steps.shape)) * steps)

    def divisor(self, total: Tensor) -> Tensor:
        """What sums of weights become before they divide."""
        total = total.detach() if self.detached else total
        total = total.abs() if self.absolute else total
        kept = total if self.least is None else total.clamp(min=self.least)
        return kept + self.added if self.added else kept

    def keeping(self, places: Sequence[int]) -> LinearWeights:
        """Those of the heads at these places."""
        return replace(self, rates=tuple(self.rates[i] for i in places) if self.rates else ())

    def faults(self, heads: int) -> list[str]:
        """What is wrong with it as the weights of so many heads."""
        found = []
        if self.rates and (len(self.rates) != heads or not all(0 <= r < math.inf for r in self.rates)):
            found.append(f"rates {self.rates!r}, expected none or {heads} finite numbers of at least 0")
        if not math.isfinite(self.added) or not (self.least is None or math.isfinite(self.least)):
            found.append(f"added {self.added!r} and least {self.least!r}, expected finite numbers")
        return found

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "rates": list(self.rates)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LinearWeights:
        return cls(**{**data, "rates": tuple(data["rates"])})

    def __str__(self) -> str:
        """ "no softmax, weights that fade, divided by their sum" """
        parts = ["no softmax"]
        if any(self.rates):
            parts.append("weights that fade")
        if self.divides:
            parts.append("weights divided by their sum")
        return ", ".join(parts)
