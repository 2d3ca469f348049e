"""Head outputs that are partly computed with a map that no input changes: an edit, and what a model has of itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnopt.base.bit_table import indices, stretched
from attnopt.base.sizes import is_static
from attnopt.ir.call_tensor import CallTensor, Source, of_heads, source_from_json
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import HeadEdit, HeadMap, heads_told, without
from attnopt.ir.tokens import only_at, told


@dataclass(frozen=True)
class Mixed(HeadEdit):
    """``o_h -> (1 - g_h) o_h + g_h map_h @ v_h``, which is what mixing ``map_h`` into the weights by ``g_h`` gives.

    ``gates``: one for each head.  ``map``: [heads, L, S], or [1, L, S] for all of them, also with a batch of B or 1 before
    it, which what a call brings always has; other lengths are a ValueError.
    """

    kind: ClassVar[str] = "mixed"
    heads: tuple[int, ...]
    gates: tuple[float, ...]
    map: Source
    tokens: tuple[int, ...] | None = None  # the queries that this applies to, sorted, negative from the end; None: all
    after_past: bool = False  # the queries follow earlier tokens, which positions count, too

    def __post_init__(self) -> None:
        n, shape = len(self.heads), self.map.shape
        ranks = (4,) if isinstance(self.map, CallTensor) else (3, 4)
        if len(self.gates) != n or len(shape) not in ranks or shape[-3] not in (1, n):
            raise ValueError(f"a map of shape {list(self.map.shape)} and {len(self.gates)} gates for {n} heads")

    @property
    def changed(self) -> tuple[int, ...]:
        return self.heads

    @property
    def overwritten(self) -> tuple[int, ...]:
        everywhere = self.tokens is None
        return tuple(h for h, gate in zip(self.heads, self.gates, strict=True) if gate == 1.0 and everywhere)

    def pairs(self, q_len: int, kv_len: int) -> int:
        return len(self.heads) * q_len * kv_len

    @property
    def reads_positions(self) -> bool:
        return True

    @property
    def tensors(self) -> tuple[Source, ...]:
        return (self.map,)

    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        (maps,) = tensors
        if isinstance(self.map, Constant) and self.map.shape[-2:] != (o.shape[2], v.shape[2]):
            rows, columns = self.map.shape[-2:]
            raise ValueError(f"a map of {rows} x {columns} for {o.shape[2]} queries and {v.shape[2]} keys")
        places = [place for place, head in enumerate(spec.heads) if head in self.heads]
        taken = [self.heads.index(spec.heads[place]) for place in places]
        wide = torch.promote_types(v.dtype, torch.float32)
        mapped = _mapped(
            _taken(maps, taken, -3) if maps.shape[-3] > 1 else maps, v, [spec.kv_of_head[p] for p in places], wide
        )
        pieces = list(self._pieces(places, [self.gates[i] for i in taken], o, mapped))
        new = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return only_at(self.tokens, o, new, v.shape[2] if self.after_past else o.shape[2])

    def _pieces(self, places: Sequence[int], gates: Sequence[float], o: Tensor, mapped: Tensor) -> Iterator[Tensor]:
        """Runs of neighbouring heads of ``o``, some of which, at ``places``, are mixed with ``mapped``."""
        kinds = dict(zip(places, ("mapped" if gate == 1.0 else "mixed" for gate in gates), strict=True))
        done = 0
        for kind, members in groupby(range(o.shape[1]), key=lambda place: kinds.get(place, "as it is")):
            run = list(members)
            own = o if len(run) == o.shape[1] else o[:, run[0] : run[-1] + 1]
            if kind == "as it is":
                yield own
                continue
            part = mapped if len(run) == mapped.shape[1] else mapped[:, done : done + len(run)]
            if kind == "mixed":
                mine = gates[done : done + len(run)]
                keep, gate = (
                    stretched(((value, 1) for value in values), part.device, part.dtype).reshape(1, -1, 1, 1)
                    for values in ([1.0 - g for g in mine], mine)
                )
                part = own.to(part.dtype) * keep + part * gate
            done += len(run)
            yield part.to(o.dtype)

    def keeping(self, kept: Collection[int]) -> Mixed | None:
        places = [i for i, h in enumerate(self.heads) if h in kept]
        if not places:
            return None
        maps = self.map if self.map.shape[-3] == 1 else of_heads(self.map, places, len(self.map.shape) - 3)
        heads, gates = tuple(self.heads[i] for i in places), tuple(self.gates[i] for i in places)
        return replace(self, heads=heads, gates=gates, map=maps)

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return without(known, self.heads)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "map": self.map.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        heads, gates = tuple(map(int, data["heads"])), tuple(map(float, data["gates"]))
        tokens = None if data["tokens"] is None else tuple(map(int, data["tokens"]))
        return cls(heads, gates, source_from_json(data["map"]), tokens, bool(data["after_past"]))

    def __str__(self) -> str:
        """ "a map of 16 x 16 mixed into heads 0, 2 by 0.5" """
        rows, columns = self.map.shape[-2:]
        which = f"the map {self.map}" if isinstance(self.map, CallTensor) else f"a map of {rows} x {columns}"
        by = f"{self.gates[0]:g}" if len(set(self.gates)) == 1 else f"({', '.join(f'{g:g}' for g in self.gates)})"
        return f"{which} mixed into {heads_told(self.heads)} by {by}{'' if self.tokens is None else ' at ' + told(self.tokens)}"


def mixed(spec: HeadMap, o: Tensor, v: Tensor, keep: Tensor | None, added: Tensor) -> Tensor:
    """``keep * o + added @ v``, with the operands ``keep`` and ``added`` of an attention; no ``keep`` is 1."""
    wide = torch.promote_types(v.dtype, torch.float32)
    mapped = _mapped(added, v, spec.kv_of_head, wide)
    return ((o.to(wide) if keep is None else o.to(wide) * keep.to(wide)) + mapped).to(o.dtype)


def _mapped(maps: Tensor, v_BGSD: Tensor, groups: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The map of each head, or one for all, [B or 1, R, L, S] or [R, L, S], times the values of the group that it reads:
    [B, heads, L, D].

    Where all sequences share the maps, the batch joins the features: as a batch of products, the maps would be copied for
    every sequence.
    """
    if maps.dim() == 4 and not (is_static(maps.shape[0]) and maps.shape[0] == 1):
        return maps.to(dtype) @ _taken(v_BGSD, groups, 1).to(dtype)
    maps_RLS = maps[0] if maps.dim() == 4 else maps
    wanted = list(dict.fromkeys(groups)) if len(maps_RLS) == 1 else groups
    v_RSBD = _taken(v_BGSD, wanted, 1).to(dtype).permute(1, 2, 0, 3)
    R, S, B, D = v_RSBD.shape
    if len(maps_RLS) == 1:
        made = (maps_RLS[0].to(dtype) @ v_RSBD.transpose(0, 1).reshape(S, -1)).reshape(-1, R, B, D).permute(2, 1, 0, 3)
        return _taken(made, [wanted.index(group) for group in groups], 1)
    return (maps_RLS.to(dtype) @ v_RSBD.reshape(R, S, -1)).reshape(R, -1, B, D).permute(2, 0, 1, 3)


def _taken(x: Tensor, places: Sequence[int], axis: int) -> Tensor:
    """``x`` at these places of an axis."""
    if list(places) == list(range(x.shape[axis])):
        return x
    return x.index_select(axis, indices(places, x.device))
