"""Segments of tokens (documents, images, modalities, regions), and which segments see which."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate

import torch
from torch import Tensor

from attnopt.base.bit_table import looked_up, stretched
from attnopt.base.input import Input
from attnopt.base.intervals import Ranges, Reach, common, merged
from attnopt.base.options import whole
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import Pattern

Pairs = tuple[tuple[int | None, int | None], ...]  # a segment of queries and one of keys; None: every token


@dataclass(frozen=True, repr=False, init=False)
class Segments(Pattern):
    """A query of segment a sees a key of segment b if ``(a, b)`` is in ``pairs``; by default only its own segment.

    In a pair, None stands for every token, also one of no segment: ``(None, b)`` shows the keys of b to all queries.

    ``ids``: the segment of every token, numbered from 0; ``(id, count)`` means ``count`` tokens in a row.  Positions
    beyond these tokens see nothing.  Raises PolicyError.

    With an ``Input``, each call brings the ids: integers [length] or [batch, length].  A token with an id below 0, or with one
    that no pair names, belongs to no segment.  ``keys``: the input with the ids of the keys, where these are another
    sequence.  Such segments are for the pass ``sparse``, alone, joined with ``&``, or in ``PerHead``, and for ``segment-gain``.
    """

    ids: tuple[tuple[int, int], ...] | Input  # runs of neighbouring tokens: id and count
    pairs: Pairs | None
    keys: Input | None

    def __init__(
        self, ids: object, pairs: Sequence[tuple[int | None, int | None]] | None = None, keys: Input | None = None
    ) -> None:
        object.__setattr__(self, "pairs", None if pairs is None else _pairs(pairs))
        object.__setattr__(self, "keys", keys)
        if keys is not None and not (isinstance(ids, Input) and isinstance(keys, Input)):
            raise PolicyError(f"Segments: invalid value keys={keys!r}: expected an Input beside one for the queries")
        object.__setattr__(self, "ids", ids if isinstance(ids, Input) else self._runs(ids))

    @staticmethod
    def _runs(ids: object) -> tuple[tuple[int, int], ...]:
        listed = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(listed, (list, tuple)) or not listed:
            raise PolicyError(f"Segments: invalid value ids={ids!r}: expected one segment id per token")
        runs: list[list[int]] = []
        for entry in listed:
            number, count = _run(entry)
            if runs and runs[-1][0] == number:
                runs[-1][1] += count
            else:
                runs.append([number, count])
        return tuple((number, count) for number, count in runs)

    @property
    def is_positional(self) -> bool:
        return self.keys is None

    @property
    def lengths(self) -> range | None:
        if self.inputs:
            return None
        return range(self._tokens, self._tokens + 1)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        tokens = self._tokens
        inside = (i >= 0) & (i < tokens) & (j >= 0) & (j < tokens)
        segment = stretched(((self._place[number], count) for number, count in self._listed), i.device)
        query, key = segment[i.clamp(0, tokens - 1)], segment[j.clamp(0, tokens - 1)]
        if self.pairs is None:
            return inside & (query == key)
        rows = [0] * len(self._place)
        for a, b in self.numbered_pairs or ():
            shown = (1 << len(rows)) - 1 if b is None else 1 << b
            for row in range(len(rows)) if a is None else (a,):
                rows[row] |= shown
        return inside & looked_up(rows, len(rows), query, key)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        begin, end = max(0, first), min(last, self._tokens - 1)
        if begin > end:
            return Reach((), ())
        touched = self._listed[bisect_right(self._starts, begin) - 1 : bisect_right(self._starts, end)]
        seen = [self._keys[number] for number in {number for number, _ in touched}]
        sure = reduce(common, seen) if (begin, end) == (first, last) else ()
        return Reach(all=sure, some=merged(r for ranges in seen for r in ranges))

    def __repr__(self) -> str:
        options = {"pairs": self.pairs, "keys": self.keys}
        given = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        if isinstance(self.ids, Input):
            return f"Segments({self.ids}{given})"
        runs = ", ".join(str(number) if count == 1 else f"({number}, {count})" for number, count in self.ids)
        return f"Segments({f'({runs},)' if len(self.ids) == 1 else f'({runs})'}{given})"

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Where the ids come from, if each call brings them: of queries, and of keys."""
        if not isinstance(self.ids, Input):
            return ()
        return self.ids, self.ids if self.keys is None else self.keys

    @cached_property
    def side_by_side(self) -> Segments:
        """The same segments of tokens that are sorted by them."""
        counts: dict[int, int] = dict.fromkeys(sorted(self._place), 0)
        for number, count in self._listed:
            counts[number] += count
        return self if len(counts) == len(self._listed) else Segments(tuple(counts.items()), self.pairs)

    @cached_property
    def grid(self) -> tuple[int, int, int] | None:
        """(outer, size, inner) if the tokens are a grid of these axes, whose middle one runs through each segment, and no segment
        sees another: rows (inner is 1), columns (outer is 1), or one of more axes.  None otherwise."""
        own = {(number, number) for number in range(len(self._place))}
        if self.numbered_pairs is not None and set(self.numbered_pairs) != own:
            return None
        numbers = [self._place[number] for number, count in self._listed for _ in range(count)]
        inner = next((t for t in range(1, len(numbers)) if numbers[t] == 0), 1)
        whole = numbers.count(0) * inner
        if any(number != t // whole * inner + t % inner for t, number in enumerate(numbers)) or len(numbers) % whole:
            return None
        return len(numbers) // whole, whole // inner, inner

    def at(self, places: Tensor) -> Tensor:
        """The segments at these places, numbered in the order of appearance; -1 beyond the tokens."""
        inside = (places >= 0) & (places < self._tokens)
        ids = stretched(((self._place[number], count) for number, count in self._listed), places.device)
        return torch.where(inside, ids[places.clamp(0, self._tokens - 1)], -1)

    @property
    def numbered_pairs(self) -> Pairs | None:
        """Which segments see which, with the numbers of ``at``."""
        if self.pairs is None:
            return None
        place = self._place
        known = [pair for pair in self.pairs if all(x is None or x in place for x in pair)]
        return tuple((None if a is None else place[a], None if b is None else place[b]) for a, b in known)

    @property
    def _listed(self) -> tuple[tuple[int, int], ...]:
        if isinstance(self.ids, Input):
            raise PolicyError(
                f"{self}: its ids are unknown until the model is called",
                hint="use it in the pass sparse, alone, joined with &, or in PerHead",
            )
        return self.ids

    @cached_property
    def _place(self) -> dict[int, int]:
        """The distinct segments, in order of appearance."""
        return {number: place for place, number in enumerate(dict.fromkeys(number for number, _ in self._listed))}

    @cached_property
    def _starts(self) -> list[int]:
        """The first token of each run."""
        return [0, *accumulate(count for _, count in self._listed)][:-1]

    @cached_property
    def _tokens(self) -> int:
        return sum(count for _, count in self._listed)

    @cached_property
    def _keys(self) -> dict[int, Ranges]:
        """What the queries of each segment see."""
        own: dict[int, list[tuple[int, int]]] = {number: [] for number in self._place}
        for start, (number, count) in zip(self._starts, self._listed, strict=True):
            own[number].append((start, start + count))
        if self.pairs is None:
            return {number: tuple(ranges) for number, ranges in own.items()}
        seen: dict[int, list[tuple[int, int]]] = {number: [] for number in own}
        everything = [run for runs in own.values() for run in runs]
        for a, b in self.pairs:
            shown = everything if b is None else own.get(b, [])
            for number in seen if a is None else {a} & seen.keys():
                seen[number] += shown
        return {number: merged(ranges) for number, ranges in seen.items()}


def _named(segment: object) -> int | None:
    return None if segment is None else whole("Segments", "pairs", segment)


def _run(entry: object) -> tuple[int, int]:
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        return whole("Segments", "ids", entry[0]), whole("Segments", "ids", entry[1], least=1)
    return whole("Segments", "ids", entry), 1


def _pairs(pairs: object) -> Pairs:
    if isinstance(pairs, Sequence) and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        return tuple(
            sorted({(_named(a), _named(b)) for a, b in pairs}, key=lambda pair: [-1 if x is None else x for x in pair])
        )
    raise PolicyError(f"Segments: invalid value pairs={pairs!r}: expected pairs of a query segment and a key segment")
