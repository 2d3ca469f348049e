"""A mixer in the place of attention, as an edit of head outputs that ignores what they were."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnopt.base.bit_table import indices
from attnopt.ir.call_tensor import Source
from attnopt.ir.constant import Constant, Weight
from attnopt.ir.head_edits import HeadEdit, HeadMap, without
from attnopt.ir.mixer import Mixer, Tokens
from attnopt.ir.mixer_registry import mixer as read_mixer
from attnopt.ir.operands import HIDING


@dataclass(frozen=True)
class TokenMixing(HeadEdit):
    """``o = mixer(v)``, or ``mixer(q, k, v)``, for all heads; ``weights``: those of the mixer.

    ``padded``: masks and biases hide keys from every query or from none; the values of hidden ones are zeros to the mixer.
    """

    kind: ClassVar[str] = "token-mixing"
    fits_other_values: ClassVar[bool] = False
    reads_masks: ClassVar[bool] = True
    heads: tuple[int, ...]
    mixer: Mixer
    weights: tuple[Constant, ...]
    padded: bool = False

    @property
    def changed(self) -> tuple[int, ...]:
        return self.heads

    @property
    def overwritten(self) -> tuple[int, ...]:
        return self.heads

    @property
    def reads_keys(self) -> bool:
        return self.mixer.reads_keys

    @property
    def reads_positions(self) -> bool:
        return True

    @property
    def joins_heads(self) -> bool:
        return not self.mixer.by_head

    @property
    def tensors(self) -> tuple[Source, ...]:
        return self.weights

    def pairs(self, q_len: int, kv_len: int) -> int:
        return len(self.heads) * self.mixer.work(q_len)

    def apply(
        self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor], *,
        k: Tensor | None = None, mask: Tensor | None = None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if spec.heads != self.heads:
            raise ValueError(f"a mixer of heads {self.heads} for heads {spec.heads}")
        read = v if k is None else k  # a mixer of values alone reads neither
        seen = _seen(mask, bias) if self.padded else None
        values = _of_heads(v, spec.kv_of_head)
        if seen is not None:
            values = values.masked_fill(~seen[:, None, :, None], 0.0)
        return self.mixer.mix(Tokens(q, _of_heads(read, spec.kv_of_head), values, seen), tensors)

    def keeping(self, kept: Collection[int]) -> TokenMixing | None:
        places = [i for i, h in enumerate(self.heads) if h in kept]
        if not places:
            return None
        if len(places) == len(self.heads):
            return self
        if self.joins_heads:
            raise ValueError("heads that a mixer joins cannot be removed; prune before")
        weights = tuple(type(w).of(w.tensor()[places]) for w in self.weights)
        return replace(self, heads=tuple(self.heads[i] for i in places), weights=weights)

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return without(known, self.heads)

    def to_json(self) -> dict[str, Any]:
        weights = [{"trained": isinstance(w, Weight), **w.to_json()} for w in self.weights]
        return {
            "kind": self.kind, "heads": list(self.heads), "mixer": self.mixer.to_json(), "weights": weights,
            "padded": self.padded,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        weights = tuple((Weight if w["trained"] else Constant).from_json(w) for w in data["weights"])
        heads = tuple(map(int, data["heads"]))
        return cls(heads, read_mixer(cls.kind, str(data["mixer"])), weights, bool(data["padded"]))

    def __str__(self) -> str:
        return f"{self.mixer} in the place of attention"


def _seen(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Bool [B|1, S]: the keys that some query sees."""
    seen = [] if mask is None else [mask.flatten(1, 2).any(1)]
    if bias is not None:
        seen.append(bias.amax((1, 2)) > HIDING)
    return torch.logical_and(*seen) if len(seen) == 2 else next(iter(seen), None)


def _of_heads(x: Tensor, kv_of_head: Sequence[int]) -> Tensor:
    """[B, H, L, D]: of keys or values, those that each head reads."""
    if list(kv_of_head) == list(range(x.shape[1])):
        return x
    return x.index_select(1, indices(kv_of_head, x.device))
