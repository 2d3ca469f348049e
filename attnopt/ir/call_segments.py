"""Segments of tokens whose ids each call brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from attnopt.base.bit_table import indices
from attnopt.base.input import Input
from attnopt.base.sizes import same_size
from attnopt.errors import PolicyError
from attnopt.ir.call_tensor import BATCH, KEYS, QUERIES, CallTensor, Source
from attnopt.ir.constant import Constant
from attnopt.ir.operands import SegmentTensors
from attnopt.patterns import And, Pattern, Segments
from attnopt.patterns.algebra import FULL, all_of
from attnopt.patterns.segments import Pairs

_SMALL, _GAPS = 256, 4  # rows of a table of pairs that always may be there, and for each id that pairs name


@dataclass(frozen=True)
class CallSegments:
    """A query sees a key if their segments are one of the pairs.

    ``queries`` and ``keys``: the inputs with the ids, integers [length] or [B or 1, length]; those of the keys may be longer,
    and are then those of all tokens, the queries last.  ``pairs``: of each head, None if it sees all keys; or None for
    all heads: every segment sees itself.  An id below 0, or above all of the pairs, is no segment's.
    """

    queries: Input
    keys: Input
    pairs: tuple[Pairs | None, ...] | None = None

    @property
    def tensors(self) -> tuple[Source, ...]:
        """The ids of queries and keys, or of all tokens if one input has both, and the table of ``SegmentTensors``."""
        keys = CallTensor(self.keys, (BATCH, KEYS), is_ids=True)
        own = () if self.queries == self.keys else (CallTensor(self.queries, (BATCH, QUERIES), is_ids=True),)
        table = () if self.pairs is None else (self._table,)
        return (*own, keys, *table)

    def used(self, tensors: Sequence[Tensor], q_len: int) -> SegmentTensors:
        """``tensors`` as of this call.  ``q_len`` may be a SymInt."""
        table = None if self.pairs is None else tensors[-1]
        queries, keys = tensors[0], tensors[0 if self.queries == self.keys else 1]
        if self._apart:
            queries, keys = self._numbered(queries), self._numbered(keys)
        if self.queries == self.keys and not same_size(queries.shape[1], q_len):
            queries = queries[:, queries.shape[1] - q_len :]
        return SegmentTensors(queries, keys, table)

    def keeping(self, places: Sequence[int]) -> CallSegments:
        """The same for the heads at these places."""
        return self if self.pairs is None else replace(self, pairs=tuple(self.pairs[i] for i in places))

    @cached_property
    def _table(self) -> Constant:
        """As of ``SegmentTensors``, whatever is being traced: specs know no fake tensors."""
        place: dict[int | None, int | None] = {None: None, **{number: n for n, number in enumerate(self._apart)}}
        own = self.pairs or ()
        if self._apart:
            own = tuple(p if p is None else tuple((place[a], place[b]) for a, b in p) for p in own)
        with unset_fake_temporarily():
            return Constant.of(self._tabled(own))

    def _tabled(self, pairs: Sequence[Pairs | None]) -> Tensor:
        return SegmentTensors.table(pairs[:1] if len(set(pairs)) == 1 else pairs)

    @cached_property
    def _apart(self) -> tuple[int, ...]:
        """The ids that pairs name, where these are so few for their size that a table has rows for them alone."""
        named = sorted({i for own in self.pairs or () for pair in own or () for i in pair if i is not None})
        return tuple(named) if named and named[-1] >= max(_SMALL, _GAPS * len(named)) else ()

    def _numbered(self, ids: Tensor) -> Tensor:
        """The place of each among ``_apart``; -1 for all others."""
        is_one = ids.long().unsqueeze(2) == indices(self._apart, ids.device)
        return (is_one * torch.arange(1, len(self._apart) + 1, device=ids.device)).sum(2) - 1

    def to_json(self) -> dict[str, Any]:
        return {
            "queries": self.queries.name,
            "keys": self.keys.name,
            "pairs": None if self.pairs is None else [p if p is None else [list(x) for x in p] for p in self.pairs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CallSegments:
        """The inverse of ``to_json``."""
        pairs = None
        if data["pairs"] is not None:
            pairs = tuple(p if p is None else tuple((_number(a), _number(b)) for a, b in p) for p in data["pairs"])
        return cls(Input(str(data["queries"])), Input(str(data["keys"])), pairs)

    def __str__(self) -> str:
        """ "segments by region_ids" """
        names = dict.fromkeys((self.queries.name, self.keys.name))
        return f"segments by {' and '.join(names)}"


@dataclass(frozen=True)
class SegmentParts(CallSegments):
    """A partition of all pairs of tokens, the same for all heads.  ``pairs``: of each part but the last, which has all others;
    the first part that holds a pair has it."""

    def keeping(self, places: Sequence[int]) -> SegmentParts:
        return self

    def _tabled(self, pairs: Sequence[Pairs | None]) -> Tensor:
        return SegmentTensors.partition([p or () for p in pairs])


def _number(segment: Any) -> int | None:
    return None if segment is None else int(segment)


def separated(pattern: Pattern, heads: Sequence[int]) -> tuple[Pattern, CallSegments | None]:
    """For these head positions, the part of ``pattern`` that is known, and the segments whose ids a call brings.

    Raises PolicyError unless these stand alone, are joined with ``&``, or belong to some heads in ``PerHead``.
    """
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    brought = [p for p in parts if any(isinstance(leaf, Segments) and leaf.inputs for leaf in p.leaves())]
    if not brought:
        return pattern.for_heads(heads), None
    known = all_of(p for p in parts if p not in brought)
    of_heads = [brought[0].for_head(h) for h in heads]
    segments = [p for p in of_heads if isinstance(p, Segments)]
    inputs = {p.inputs for p in segments}
    if len(brought) > 1 or len(inputs) != 1 or any(p not in segments and p != FULL for p in of_heads):
        raise PolicyError(
            f"{pattern}: this use of segments that a call brings is not supported",
            hint="let segments of one input stand alone, join them with & with other patterns, or give them to some heads with "
            "PerHead, the others seeing all keys",
        )
    ((queries, keys),) = inputs
    if len(set(of_heads)) == 1 and segments[0].pairs is None:
        return known.for_heads(heads), CallSegments(queries, keys)
    if any(p.pairs is None for p in segments):
        raise PolicyError(
            f"{pattern}: heads differ, so that their segments need pairs", hint="list them: pairs=[(0, 0), (1, 1), ...]"
        )
    of_pairs = tuple(p.pairs if isinstance(p, Segments) else None for p in of_heads)
    return known.for_heads(heads), CallSegments(queries, keys, of_pairs)
