"""Gains on attention weights, by the pairs of queries and keys that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.base.bit_table import stretched
from attnopt.ir.call_segments import SegmentParts
from attnopt.patterns.algebra import Pattern, any_of
from attnopt.patterns.registry import parse
from attnopt.patterns.segments import Segments

Normalise = Literal["logits", "redistribute", "none"]
SLACK = 1e-6  # rounding of a sum of weights beside ``mass`` and ``share``


@dataclass(frozen=True)
class Part:
    """Some pairs, and their gain in each head."""

    pattern: Pattern
    gains: tuple[float, ...]


@dataclass(frozen=True)
class RowGains:
    """The gain of each piece in each row, broadcasting to [B, H, L], and the weight that the receivers, the last
    piece but one, get beside theirs: a sum, because a factor on a tiny weight would overflow."""

    gains: tuple[Tensor, ...]
    moved: Tensor | None = None


@dataclass(frozen=True)
class WeightGains:
    """Gains on the weights p of a softmax over keys and sink.  With g[j] the gain of the first part that holds the pair::

        "none":          p[j] = g[j] p[j]
        "logits":        p = softmax(s + log g)
        "redistribute":  p[j] = g[j] p[j], and the keys of ``to`` outside all parts receive what that frees, in
                         proportion to their weights

    Only rows in which the parts and ``to`` together hold at least ``mass`` of the weights, and the parts at most ``share``
    of that, change; with "redistribute", only rows in which the receivers have any weight.

    The patterns are positional, or all are segments, in pairs, of the same ids that a call brings.
    """

    parts: tuple[Part, ...]
    normalise: Normalise = "logits"
    to: Pattern | None = None
    mass: float = 0.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("gains without a part")
        if (self.to is None) == (self.normalise == "redistribute"):
            raise ValueError(
                "'redistribute' needs receivers, and nothing else has any" if self.to is None else "no use of 'to'"
            )

    @property
    def chooses(self) -> bool:
        """Whether a row changes depends on a comparison, which rounding may flip."""
        return self.mass > 0 or self.share < 1

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Of the parts, and of the receivers if there are any."""
        return (*(part.pattern for part in self.parts), *(() if self.to is None else (self.to,)))

    @cached_property
    def segments(self) -> SegmentParts | None:
        """The pieces, if each call brings the ids of their segments."""
        first = self.parts[0].pattern
        if not isinstance(first, Segments) or not first.inputs:
            return None
        queries, keys = first.inputs
        return SegmentParts(queries, keys, tuple(p.pairs for p in self.patterns if isinstance(p, Segments)))

    @property
    def count(self) -> int:
        """Of pieces."""
        return len(self.patterns) + 1

    @property
    def pieces(self) -> tuple[Pattern, ...]:
        """Disjoint patterns that together hold every pair: the parts, the receivers if there are any, all others.  They need
        positional patterns."""
        listed = self.patterns
        alone = [reduce(lambda p, before: p & ~before, listed[:i], pattern) for i, pattern in enumerate(listed)]
        return (*alone, ~any_of(listed))

    def of_rows(self, masses: Sequence[Tensor]) -> RowGains:
        """What happens in each row.  ``masses``: the weight of each piece in each row, [B, H, L], which is 0 everywhere in a
        row that sees nothing."""
        gains = [_of_heads(part.gains, masses[0]) for part in self.parts]
        n, one = len(gains), masses[0].new_ones(1, 1, 1)
        if not self.chooses and self.to is None:
            return RowGains((*gains, one))
        held = reduce(torch.add, masses[:n])
        both = held if self.to is None else held + masses[n]
        changes = (both >= self.mass - SLACK) & (held <= self.share * both + SLACK)
        if self.to is None:
            return RowGains((*(torch.where(changes, g, one) for g in gains), one))
        changes = changes & (masses[n] > 0)
        freed = reduce(torch.add, [(1.0 - g) * m for g, m in zip(gains, masses, strict=False)])
        moved = torch.where(changes, freed, torch.zeros_like(freed))
        return RowGains((*(torch.where(changes, g, one) for g in gains), one, one), moved)

    def keeping(self, places: Sequence[int]) -> WeightGains:
        """The same gains for the heads at these places."""
        parts = tuple(Part(p.pattern.for_heads(places), tuple(p.gains[i] for i in places)) for p in self.parts)
        return replace(self, parts=parts, to=None if self.to is None else self.to.for_heads(places))

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": [[part.pattern.to_json(), list(part.gains)] for part in self.parts],
            "normalise": self.normalise,
            "to": None if self.to is None else self.to.to_json(),
            "mass": self.mass,
            "share": self.share,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WeightGains:
        """The inverse of ``to_json``."""
        return cls(
            tuple(Part(parse(pattern), tuple(map(float, gains))) for pattern, gains in data["parts"]),
            data["normalise"],
            None if data["to"] is None else parse(data["to"]),
            float(data["mass"]),
            float(data["share"]),
        )

    def __str__(self) -> str:
        """ "weights x 0.5 in Sinks(n=4) (none)" """
        parts = ", ".join(f"weights x {_listed(part.gains)} in {part.pattern}" for part in self.parts)
        to = "" if self.to is None else f" to {self.to}"
        least = f" where they hold {self.mass:g}" if self.mass else ""
        most = f" and a share of at most {self.share:g}" if self.share < 1 else ""
        return f"{parts} ({self.normalise}{to}{least}{most})"


def _of_heads(gains: Sequence[float], like: Tensor) -> Tensor:
    """[1, H, 1]"""
    return stretched(((gain, 1) for gain in gains), like.device, like.dtype).view(1, -1, 1)


def _listed(gains: Sequence[float]) -> str:
    distinct = dict.fromkeys(gains)
    return f"{next(iter(distinct)):g}" if len(distinct) == 1 else f"({', '.join(f'{g:g}' for g in gains)})"
