"""A pattern for each head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnopt.base.options import wholes
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import FULL, Full, Pattern
from attnopt.patterns.lookback import Past, widest


@dataclass(frozen=True, repr=False, init=False)
class PerHead(Pattern):
    """One pattern per head: a mapping from a head position, or a tuple of them, to a pattern; ``default`` for the
    others.

    Raises PolicyError for a duplicate head.
    """

    groups: tuple[
        tuple[tuple[int, ...], Pattern], ...
    ]  # disjoint positions, ordered by the first position of each group
    default: Pattern

    def __init__(self, heads: Mapping[Any, Pattern], default: Pattern = FULL) -> None:
        if not isinstance(heads, Mapping) or not all(isinstance(p, Pattern) for p in (*heads.values(), default)):
            raise PolicyError(f"PerHead: invalid value {heads!r}: expected a mapping from heads to patterns")
        of_place: dict[int, Pattern] = {}
        for named, pattern in heads.items():
            for place in wholes("PerHead", "heads", named):
                if place in of_place:
                    raise PolicyError(f"PerHead: duplicate head {place}")
                of_place[place] = pattern
        by_pattern: dict[Pattern, list[int]] = {}
        for place in sorted(of_place):
            by_pattern.setdefault(of_place[place], []).append(place)
        object.__setattr__(self, "groups", tuple((tuple(places), p) for p, places in by_pattern.items()))
        object.__setattr__(self, "default", default)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (*(p for _, p in self.groups), self.default)

    @property
    def look_back(self) -> Past | None:
        return widest(p.look_back for p in self.parts)

    def neighbours(self, tile: tuple[int, ...]) -> Iterator[Pattern]:
        for places, part in self.groups:
            for changed in part.neighbours(tile):
                yield PerHead({**dict(self.groups), places: changed}, self.default)
        yield from (PerHead(dict(self.groups), changed) for changed in self.default.neighbours(tile))

    @property
    def is_causal(self) -> bool:
        return all(p.is_causal for p in self.parts)

    @property
    def is_per_head(self) -> bool:
        return True

    @property
    def named_heads(self) -> int:
        own = max((places[-1] + 1 for places, _ in self.groups), default=0)
        return max(own, *(p.named_heads for p in self.parts))

    def for_head(self, place: int) -> Pattern:
        named = next((p for places, p in self.groups if place in places), self.default)
        return named.for_head(place)

    def for_heads(self, places: Sequence[int]) -> Pattern:
        kept = [self.for_head(place) for place in places]
        if len(set(kept)) == 1:
            return kept[0]
        own = {new: p for new, p in enumerate(kept) if p != self.default}
        return PerHead(own, self.default.for_heads(places))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        raise TypeError("a PerHead pattern differs by head; use mask() or for_head()")

    def __repr__(self) -> str:
        heads = ", ".join(f"{places if len(places) > 1 else places[0]}: {p!r}" for places, p in self.groups)
        tail = "" if self.default == Full() else f", default={self.default!r}"
        return f"PerHead({{{heads}}}{tail})"
