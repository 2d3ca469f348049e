"""Heads that see equally far back, and so need the same tokens of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.patterns.algebra import Pattern
from attnopt.patterns.lookback import Past, widest


@dataclass(frozen=True)
class HeadGroup:
    """Key/value heads that keep the same tokens, and the query heads that read them, in the order of these."""

    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]
    past: Past | None  # None: all tokens


def head_groups(pattern: Pattern, num_heads: int, kv_heads: int) -> list[HeadGroup]:
    """Groups of equal reach.  A key/value head keeps what any of its query heads can see; consecutive query heads share one."""
    ratio = num_heads // kv_heads
    readers = [tuple(range(g * ratio, (g + 1) * ratio)) for g in range(kv_heads)]
    members: dict[Past | None, list[int]] = {}
    for g, heads in enumerate(readers):
        members.setdefault(widest(pattern.for_head(h).look_back for h in heads), []).append(g)
    return [HeadGroup(tuple(own), tuple(h for g in own for h in readers[g]), past) for past, own in members.items()]
