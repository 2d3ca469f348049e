"""How much of the past a pattern can still see: what a cache of keys and values has to keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Past:
    """The first ``sinks`` tokens, and the ``recent`` tokens before the query's own; no query sees any other earlier key.

    Where keys are dropped between the two, the pattern still means the same on what is left, counted from the last key: a
    sink then stands more than ``recent`` places before every query, so no window takes it for a neighbour.
    """

    sinks: int
    recent: int


def widest(parts: Iterable[Past | None]) -> Past | None:
    """Enough for each of the parts; None where there are none, or one may see all of the past."""
    found = list(parts)
    known = [p for p in found if p is not None]
    if not known or len(known) < len(found):
        return None
    return Past(max(p.sinks for p in known), max(p.recent for p in known))
