"""Keys and values of zeros beyond the edges of a sequence, as zero-padded windows have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.patterns.algebra import Pattern
from attnopt.patterns.registry import parse

_NONE = -1e30  # the logarithm of no keys: finite, so that no difference of two of them is undefined


@dataclass(frozen=True)
class ZeroKeys:
    """Each key that the windows of ``pattern`` have beyond the edges of the sequence or grid is zero, like its value, and is
    not masked (HaloNet, arXiv:2103.12731, as timm computes it).

    A score of 0 takes exp(0) of the softmax's mass, so n such keys are a sink logit of log(n).  They belong to the attention like
    sinks: a pattern that hides keys later leaves them.
    """

    pattern: Pattern

    @staticmethod
    def known(pattern: Pattern, heads: Sequence[int]) -> bool:
        """The pattern has windows in each of these heads (positions), or shows all keys there."""
        at = torch.zeros(1, dtype=torch.int64)
        return all(pattern.for_head(h).beyond(at, 1) is not None for h in heads)

    def logits(self, q_len: int, kv_len: int, heads: int, like: Tensor) -> Tensor:
        """[1, H or 1, L, 1] in the dtype and on the device of ``like``: the logarithm of the number of zero keys of each query;
        so low that it does not count where there are none."""
        i = torch.arange(q_len, device=like.device) + (kv_len - q_len)
        places = range(heads if self.pattern.is_per_head else 1)
        patterns = [self.pattern.for_head(h) for h in places]
        of_pattern = {p: p.beyond(i, kv_len) for p in dict.fromkeys(patterns)}
        counts = torch.stack([n for p in patterns if (n := of_pattern[p]) is not None])
        logs = counts.clamp(min=1).to(like.dtype).log()
        return torch.where(counts > 0, logs, torch.full_like(logs, _NONE))[None, :, :, None]

    def keeping(self, places: Sequence[int]) -> ZeroKeys:
        """The same for the heads at these places."""
        return ZeroKeys(self.pattern.for_heads(places))

    def to_json(self) -> str:
        return self.pattern.to_json()

    @classmethod
    def from_json(cls, text: str) -> ZeroKeys:
        """The inverse of ``to_json``."""
        return cls(parse(text))

    def __str__(self) -> str:
        return f"zero keys beyond the edges of {self.pattern}"
