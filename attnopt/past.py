"""How much of the past a pattern can still see: what a cache of keys and values has to keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnopt.pattern import And, Full, Or, Pattern, PerHead
from attnopt.patterns import Causal, Dilated, Sinks, Window


@dataclass(frozen=True)
class Past:
    """The first ``sinks`` tokens, and the ``recent`` tokens before the query's own; no query sees any other earlier key.

    Where keys are dropped between the two, the pattern still means the same on what is left, counted from the last key: a
    sink then stands more than ``recent`` places before every query, so no window takes it for a neighbour.
    """

    sinks: int
    recent: int


def past_of(pattern: Pattern) -> Past | None:
    """What later queries can see of earlier tokens under ``pattern``; None: all of it, as far as is known."""
    if isinstance(pattern, Window):
        return Past(0, pattern.left)
    if isinstance(pattern, Dilated):
        return Past(0, pattern.left * pattern.dilation)
    if isinstance(pattern, Sinks):
        return Past(pattern.n, 0)
    if isinstance(pattern, Or | PerHead):
        return _widest(past_of(p) for p in pattern.parts)
    if isinstance(pattern, And):
        return _widest(past_of(p) for p in pattern.parts if not isinstance(p, Causal | Full))
    return None


def _widest(parts: Iterable[Past | None]) -> Past | None:
    """Enough for each of the parts."""
    found = list(parts)
    known = [p for p in found if p is not None]
    if not known or len(known) < len(found):
        return None
    return Past(max(p.sinks for p in known), max(p.recent for p in known))
