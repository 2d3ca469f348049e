"""Heads that see equally far back, and so need the same tokens of a cache."""

from __future__ import annotations

from collections.abc import Sequence
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


def cache_note(groups: Sequence[HeadGroup], numbers: Sequence[int]) -> str | None:
    """What a cache keeps, for the report; None if it keeps everything.  ``numbers``: the original key/value heads."""
    if all(group.past is None for group in groups):
        return None
    if len(groups) == 1:
        return f"its cache keeps {_kept(groups[0].past)}"
    each = [f"{_kept(g.past)} of key/value heads {', '.join(str(numbers[h]) for h in g.kv_heads)}" for g in groups]
    return f"its cache keeps {'; '.join(each)}"


def _kept(past: Past | None) -> str:
    if past is None:
        return "all tokens"
    return (
        f"the first {past.sinks} and the last {past.recent} tokens" if past.sinks else f"the last {past.recent} tokens"
    )
