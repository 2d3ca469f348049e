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
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import HeadEdit, HeadMap, heads_told, without


@dataclass(frozen=True)
class Mixed(HeadEdit):
    """``o_h -> (1 - g_h) o_h + g_h map_h @ v_h``, which is what mixing ``map_h`` into the weights by ``g_h`` gives.

    ``gates``: one for each head.  ``map``: [heads, L, S], or [1, L, S] for all of them; other lengths are a ValueError.
    """

    kind: ClassVar[str] = "mixed"
    heads: tuple[int, ...]
    gates: tuple[float, ...]
    map: Constant

    def __post_init__(self) -> None:
        n = len(self.heads)
        if len(self.gates) != n or len(self.map.shape) != 3 or self.map.shape[0] not in (1, n):
            raise ValueError(f"a map of shape {list(self.map.shape)} and {len(self.gates)} gates for {n} heads")

    @property
    def changed(self) -> tuple[int, ...]:
        return self.heads

    @property
    def overwritten(self) -> tuple[int, ...]:
        return tuple(h for h, gate in zip(self.heads, self.gates, strict=True) if gate == 1.0)

    @property
    def pairs(self) -> int:
        return len(self.heads) * self.map.shape[1] * self.map.shape[2]

    @property
    def reads_positions(self) -> bool:
        return True

    @property
    def constants(self) -> tuple[Constant, ...]:
        return (self.map,)

    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, constants: Sequence[Tensor]) -> Tensor:
        (maps,) = constants
        if (o.shape[2], v.shape[2]) != tuple(maps.shape[1:]):
            raise ValueError(
                f"a map of {maps.shape[1]} x {maps.shape[2]} for {o.shape[2]} queries and {v.shape[2]} keys"
            )
        places = [place for place, head in enumerate(spec.heads) if head in self.heads]
        rows = [self.heads.index(spec.heads[place]) for place in places]
        wide = torch.promote_types(v.dtype, torch.float32)
        mapped = _mapped(
            _taken(maps, rows, 0) if len(maps) > 1 else maps, v, [spec.kv_of_head[p] for p in places], wide
        )
        pieces = list(self._pieces(places, [self.gates[row] for row in rows], o, mapped))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

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
        maps = self.map if self.map.shape[0] == 1 else Constant.of(self.map.tensor()[torch.tensor(places)])
        return replace(
            self, heads=tuple(self.heads[i] for i in places), gates=tuple(self.gates[i] for i in places), map=maps
        )

    def constant_heads(self, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return without(known, self.heads)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "heads": list(self.heads), "gates": list(self.gates), "map": self.map.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        heads, gates = tuple(map(int, data["heads"])), tuple(map(float, data["gates"]))
        return cls(heads, gates, Constant.from_json(data["map"]))

    def __str__(self) -> str:
        """ "a map of 16 x 16 mixed into heads 0, 2 by 0.5" """
        rows, columns = self.map.shape[1:]
        by = f"{self.gates[0]:g}" if len(set(self.gates)) == 1 else f"({', '.join(f'{g:g}' for g in self.gates)})"
        return f"a map of {rows} x {columns} mixed into {heads_told(self.heads)} by {by}"


def mixed(spec: HeadMap, o: Tensor, v: Tensor, keep: Tensor | None, added: Tensor) -> Tensor:
    """``keep * o + added @ v``, with the operands ``keep`` and ``added`` of an attention; no ``keep`` is 1."""
    wide = torch.promote_types(v.dtype, torch.float32)
    groups = spec.kv_of_head
    if is_static(added.shape[0]) and added.shape[0] == 1:
        mapped = _mapped(added[0], v, groups, wide)
    else:
        mapped = added.to(wide) @ _taken(v, groups, 1).to(wide)
    return ((o.to(wide) if keep is None else o.to(wide) * keep.to(wide)) + mapped).to(o.dtype)


def _mapped(maps_RLS: Tensor, v_BGSD: Tensor, groups: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The map of each head, or one for all, times the values of the group that it reads: [B, heads, L, D].

    The batch joins the features: as a batch of products, the maps would be copied for every sequence.
    """
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
