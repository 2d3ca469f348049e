"""Edits of head outputs between the attention and the output projection, as frozen values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from attnopt.base.bit_table import stretched
from attnopt.ir.call_tensor import Source, of_heads, source_from_json
from attnopt.ir.constant import Constant
from attnopt.patterns.algebra import Pattern


class HeadMap(Protocol):
    """The head numbers of an attention, the position of the K/V head that each reads, and the keys that they see."""

    @property
    def heads(self) -> tuple[int, ...]: ...

    @property
    def kv_of_head(self) -> tuple[int, ...]: ...

    @property
    def pattern(self) -> Pattern: ...


class HeadEdit(ABC):
    """A change of head outputs.  Heads have their numbers from the trained model."""

    kind: ClassVar[str]
    fits_other_values: ClassVar[bool] = True  # invariant under a change of basis of values and output projection
    reads_masks: ClassVar[bool] = False  # ``apply`` also gets ``mask=`` and ``bias=``: the operands, or None

    @property
    @abstractmethod
    def changed(self) -> tuple[int, ...]:
        """The heads whose outputs change by more than a factor."""

    @property
    def overwritten(self) -> tuple[int, ...]:
        """Those of them whose previous outputs have no effect."""
        return ()

    def pairs(self, q_len: int, kv_len: int) -> int:
        """The pairs of queries and keys, over all heads, for which it multiplies values again."""
        return 0

    @property
    def tensors(self) -> tuple[Source, ...]:
        """The constants, and what each call brings, that ``apply`` receives as tensors."""
        return ()

    @property
    def reads_keys(self) -> bool:
        """``apply`` also gets ``k=``, the keys: queries and keys count, whatever becomes of the weights."""
        return False

    @property
    def joins_heads(self) -> bool:
        """The output of one head depends on others: none can be removed afterwards."""
        return False

    @property
    def reads_positions(self) -> bool:
        """What a token gets depends on its place in the sequence, or on other tokens: a decoder that sees one token at a time
        cannot apply it."""
        return False

    @abstractmethod
    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``o`` [B, H, L, Dv] after the edit; ``q`` and ``v`` are the operands of the attention.

        ``spec``: the ``AttentionSpec`` of the attention; an edit only reads its heads.
        """

    @abstractmethod
    def keeping(self, kept: Collection[int]) -> HeadEdit | None:
        """The same edit restricted to these heads; None if it then does nothing.  Raises ValueError if impossible."""

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """The heads that output the same [Dv], float64, for every token, given those that did before this edit; None if the
        edit may need all heads, so that none can be folded away."""
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain data, with its ``kind``; by default the fields of a dataclass of numbers, strings and tuples of these."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``."""
        return cls(**{name: _tuples(value) for name, value in data.items() if name != "kind"})

    def __str__(self) -> str:
        """A short description for reports."""
        return repr(self)


@dataclass(frozen=True)
class Scaled(HeadEdit):
    """Multiply head outputs: pairs of a head and its factor."""

    kind: ClassVar[str] = "scaled"
    gains: tuple[tuple[int, float], ...]

    @property
    def changed(self) -> tuple[int, ...]:
        return ()

    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        gains = dict(self.gains)
        of_head = [gains.get(h, 1.0) for h in spec.heads]
        if len(set(of_head)) == 1:
            return o * of_head[0]
        return o * stretched(((gain, 1) for gain in of_head), o.device, o.dtype).reshape(1, -1, 1, 1)

    def keeping(self, kept: Collection[int]) -> Scaled | None:
        left = tuple((h, g) for h, g in self.gains if h in kept)
        return Scaled(left) if left else None

    def times(self, later: Scaled) -> Scaled:
        """Both, one after the other."""
        first, then = dict(self.gains), dict(later.gains)
        return Scaled(tuple((h, first.get(h, 1.0) * then.get(h, 1.0)) for h in (first | then)))

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        gains = dict(self.gains)
        return {h: value * gains.get(h, 1.0) for h, value in known.items()}

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "gains": [list(pair) for pair in self.gains]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(tuple((int(h), float(g)) for h, g in data["gains"]))

    def __str__(self) -> str:
        return "gains " + ", ".join(f"{g:g} of head {h}" for h, g in self.gains)


@dataclass(frozen=True)
class TowardValues(HeadEdit):
    """``o_h -> (1 - u) o_h + u v_h`` for pairs of a head and its u; as many queries as keys."""

    kind: ClassVar[str] = "toward-values"
    amounts: tuple[tuple[int, float], ...]

    @property
    def changed(self) -> tuple[int, ...]:
        return tuple(h for h, _ in self.amounts)

    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        made: dict[int, Tensor] = {}
        for head, u in self.amounts:
            place = spec.heads.index(head)
            own, group = o[:, place : place + 1], spec.kv_of_head[place]
            value = v[:, group : group + 1].reshape(own.shape)  # not broadcast: each token uses its own value
            made[place] = value if u == 1.0 else own * (1.0 - u) + value * u
        return with_heads(o, made)

    def keeping(self, kept: Collection[int]) -> TowardValues | None:
        left = tuple((h, u) for h, u in self.amounts if h in kept)
        return TowardValues(left) if left else None

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return without(known, self.changed)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "amounts": [list(pair) for pair in self.amounts]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(tuple((int(h), float(u)) for h, u in data["amounts"]))

    def __str__(self) -> str:
        return "toward its values " + ", ".join(f"by {u:g} of head {h}" for h, u in self.amounts)


@dataclass(frozen=True)
class Replaced(HeadEdit):
    """Replace the outputs of some heads: ``values`` [heads, Dv], the same for every token, or [B or 1, heads, L, Dv].

    What a call brings is [B or 1, heads, Dv] or [B or 1, heads, L, Dv].
    """

    kind: ClassVar[str] = "replaced"
    fits_other_values: ClassVar[bool] = False
    heads: tuple[int, ...]
    values: Source
    origin: str = "given values"  # description of the values for reports

    def __post_init__(self) -> None:
        shape = self.values.shape
        if len(shape) not in ((2, 4) if isinstance(self.values, Constant) else (3, 4)) or (
            shape[0 if len(shape) == 2 else 1] != len(self.heads)
        ):
            raise ValueError(f"values of shape {list(shape)} for {len(self.heads)} heads")

    @property
    def changed(self) -> tuple[int, ...]:
        return self.heads

    @property
    def overwritten(self) -> tuple[int, ...]:
        return self.heads

    @property
    def tensors(self) -> tuple[Source, ...]:
        return (self.values,)

    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        values = of_tokens(tensors[0])
        if isinstance(self.values, Constant) and len(self.values.shape) == 4 and values.shape[2] != o.shape[2]:
            raise ValueError(f"values for {values.shape[2]} tokens, expected {o.shape[2]}")
        made: dict[int, Tensor] = {}
        for i, head in enumerate(self.heads):
            place = spec.heads.index(head)
            own = o[:, place : place + 1]
            made[place] = values[:, i : i + 1].to(o.dtype).expand(own.shape)
        return with_heads(o, made)

    def keeping(self, kept: Collection[int]) -> Replaced | None:
        places = [i for i, h in enumerate(self.heads) if h in kept]
        if not places:
            return None
        values = of_heads(self.values, places, 0 if len(self.values.shape) == 2 else 1)
        return replace(self, heads=tuple(self.heads[i] for i in places), values=values)

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        if not isinstance(self.values, Constant) or len(self.values.shape) != 2:
            return without(known, self.heads)
        return {**known, **dict(zip(self.heads, self.values.tensor().double().unbind(), strict=True))}

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "heads": list(self.heads), "values": self.values.to_json(), "origin": self.origin,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(tuple(map(int, data["heads"])), source_from_json(data["values"]), str(data["origin"]))

    def __str__(self) -> str:
        return f"{self.origin} for {heads_told(self.heads)}"


def of_tokens(x: Tensor) -> Tensor:
    """Values of heads, [heads, D], [B, heads, D] or [B, heads, L, D], as [B, heads, L or 1, D]."""
    x = x.unsqueeze(0) if x.dim() == 2 else x
    return x.unsqueeze(2) if x.dim() == 3 else x


def heads_told(heads: Sequence[int]) -> str:
    """ "head 1", "heads 1, 3" """
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"


def _tuples(value: object) -> object:
    """Lists as tuples, at any depth: JSON knows no tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def constant_heads(edits: Sequence[HeadEdit]) -> dict[int, Tensor]:
    """The heads that output the same [Dv], float64, for every token, as far as their edits show."""
    known: dict[int, Tensor] = {}
    for edit in edits:
        after = edit.constant_heads(known)
        if after is None:
            return {}
        known = after
    return known


def without(known: Mapping[int, Tensor], heads: Collection[int]) -> dict[int, Tensor]:
    """``known`` without these heads."""
    return {h: value for h, value in known.items() if h not in heads}


def with_heads(o: Tensor, new: Mapping[int, Tensor]) -> Tensor:
    """``o`` [B, H, L, Dv] with the heads at these positions replaced by tensors [B, 1, L, Dv]."""
    pieces: list[Tensor] = []
    start = 0
    for place in sorted(new):
        if start < place:
            pieces.append(o[:, start:place])
        pieces.append(new[place])
        start = place + 1
    if start < o.shape[1]:
        pieces.append(o[:, start:])
    return torch.cat(pieces, 1)
