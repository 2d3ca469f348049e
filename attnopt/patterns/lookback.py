"""How far back a pattern can see: what a cache of keys and values must keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Past:
    """The first ``sinks`` tokens, and the ``recent`` tokens before the query; no query sees any other earlier key.

    If the keys in between are dropped, the pattern keeps its meaning on the remaining ones, counted from the last key:
    a sink is then still more than ``recent`` positions before every query, so no window includes it.
    """

    sinks: int
    recent: int


def widest(parts: Iterable[Past | None]) -> Past | None:
    """Enough for each of the operands; None if there are none, or one may see the whole past."""
    found = list(parts)
    known = [p for p in found if p is not None]
    if not known or len(known) < len(found):
        return None
    return Past(max(p.sinks for p in known), max(p.recent for p in known))
