"""Queries and keys of some heads that come from another run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from attnopt.base.sizes import same_size
from attnopt.ir.call_tensor import Source, of_heads, source_from_json
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import heads_told, with_heads
from attnopt.ir.tokens import only_at, told

NAMES = {"q": "queries", "k": "keys"}


@dataclass(frozen=True)
class Transplanted:
    """``values`` [B or 1, heads, L or S, D] in the place of the queries or of the keys of some heads, which are in their order.

    They are what the scores read, whose product ``scale`` multiplies.  Keys belong to the query heads that read them.
    ``tokens``: only those at these positions (sorted, negative from the end); None: all.  A position that a sequence does not
    have is ignored.  ``after_past``: the queries follow earlier tokens, which positions count, too.
    """

    role: str
    heads: tuple[int, ...]
    values: Source
    tokens: tuple[int, ...] | None = None
    after_past: bool = False

    def __post_init__(self) -> None:
        shape = self.values.shape
        if self.role not in NAMES or len(shape) != 4 or shape[1] != len(self.heads):
            raise ValueError(f"{self.role} of shape {list(shape)} for {len(self.heads)} heads")

    def apply(self, heads: Sequence[int], own_BHND: Tensor, values: Tensor, kv_len: int) -> Tensor:
        """The queries or keys of ``heads`` with those of some of them replaced.  ``kv_len`` may be a SymInt."""
        if isinstance(self.values, Constant) and values.shape[2:] != own_BHND.shape[2:]:
            sizes = " x ".join(map(str, values.shape[2:]))
            raise ValueError(f"{NAMES[self.role]} of {sizes} for {own_BHND.shape[2]} x {own_BHND.shape[3]}")
        values = values.to(own_BHND.dtype)
        if tuple(heads) == self.heads:
            return self._chosen(own_BHND, values, kv_len)
        made: dict[int, Tensor] = {}
        for i, head in enumerate(self.heads):
            place = heads.index(head)
            made[place] = self._chosen(own_BHND[:, place : place + 1], values[:, i : i + 1], kv_len)
        return with_heads(own_BHND, made)

    def _chosen(self, own: Tensor, values: Tensor, kv_len: int) -> Tensor:
        new = values if all(map(same_size, values.shape, own.shape)) else values.expand(own.shape)
        return only_at(self.tokens, own, new, kv_len if self.after_past else own.shape[2])

    def keeping(self, kept: Collection[int]) -> Transplanted | None:
        """The same for these heads; None for none of them."""
        places = [i for i, h in enumerate(self.heads) if h in kept]
        if not places:
            return None
        return replace(self, heads=tuple(self.heads[i] for i in places), values=of_heads(self.values, places, 1))

    def to_json(self) -> dict[str, Any]:
        """Plain data, which ``from_json`` reads back."""
        tokens = None if self.tokens is None else list(self.tokens)
        return {
            "role": self.role, "heads": list(self.heads), "values": self.values.to_json(), "tokens": tokens,
            "after_past": self.after_past,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``.  Raises PolicyError, ValueError, KeyError or TypeError."""
        tokens = None if data["tokens"] is None else tuple(map(int, data["tokens"]))
        heads = tuple(map(int, data["heads"]))
        return cls(data["role"], heads, source_from_json(data["values"]), tokens, bool(data["after_past"]))

    def __str__(self) -> str:
        """ "queries of heads 0, 2 from another run at token 3" """
        source = "another run" if isinstance(self.values, Constant) else str(self.values)
        where = "" if self.tokens is None else f" at {told(self.tokens)}"
        return f"{NAMES[self.role]} of {heads_told(self.heads)} from {source}{where}"
