"""Gains of head outputs that each call brings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from attnopt.ir.call_tensor import CallTensor, Source
from attnopt.ir.head_edits import HeadEdit, HeadMap, heads_told, without


@dataclass(frozen=True)
class ScaledByCall(HeadEdit):
    """``o_h -> gains[h] * o_h`` for all heads, in the order of ``gains`` [B or 1, heads].  Nothing absorbs them."""

    kind: ClassVar[str] = "scaled-by-call"
    heads: tuple[int, ...]
    gains: CallTensor

    def __post_init__(self) -> None:
        if self.gains.shape[1:] != (len(self.heads),):
            raise ValueError(f"gains of shape {list(self.gains.shape)} for {len(self.heads)} heads")

    @property
    def changed(self) -> tuple[int, ...]:
        return ()

    @property
    def tensors(self) -> tuple[Source, ...]:
        return (self.gains,)

    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        if spec.heads != self.heads:
            raise ValueError(f"gains of {heads_told(self.heads)} for {heads_told(spec.heads)}")
        return o * tensors[0].to(o.dtype)[:, :, None, None]

    def keeping(self, kept: Collection[int]) -> ScaledByCall | None:
        places = [i for i, h in enumerate(self.heads) if h in kept]
        if not places:
            return None
        return replace(self, heads=tuple(self.heads[i] for i in places), gains=self.gains.keeping(places))

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return without(known, [h for h in self.heads if h in known and bool(known[h].any())])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "heads": list(self.heads), "gains": self.gains.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(tuple(map(int, data["heads"])), CallTensor.from_json(data["gains"]))

    def __str__(self) -> str:
        return f"{heads_told(self.heads)} scaled by {self.gains}"
