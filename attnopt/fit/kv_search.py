"""Searches for the key/value heads that lose least as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations, pairwise

from attnopt.ir.kv_partition import Group, Loss

SEARCHED = 800  # at most this many groups in the exact search


def adjacent(heads: int, count: int) -> tuple[Group, ...]:
    """``count`` runs of neighbours, as equal in size as can be."""
    cuts = [heads * i // count for i in range(count + 1)]
    return tuple(tuple(range(a, b)) for a, b in pairwise(cuts))


def agglomerated(heads: int, loss: Loss) -> dict[int, tuple[Group, ...]]:
    """For every number of groups: the two groups whose union costs least are joined, again and again."""
    groups: list[Group] = [(g,) for g in range(heads)]
    known: dict[Group, float] = {(g,): 0.0 for g in range(heads)}
    found = {heads: tuple(groups)}
    while len(groups) > 1:
        unions = [tuple(sorted((*a, *b))) for a, b in combinations(groups, 2)]
        weigh([u for u in unions if u not in known], loss, known)
        pairs = zip(combinations(groups, 2), unions, strict=True)
        (a, b), union = min(pairs, key=lambda x: known[x[1]] - known[x[0][0]] - known[x[0][1]])
        groups = sorted([g for g in groups if g not in (a, b)] + [union])
        found[len(groups)] = tuple(groups)
    return found


def optimal(heads: int, loss: Loss, counts: Sequence[int]) -> dict[int, tuple[Group, ...]]:
    """For each of ``counts``, the partition with the least total loss.

    Exact for few enough groups (dynamic programming over subsets); compared with the result of
    pairwise joining, where groups may be larger.
    """
    joined = agglomerated(heads, loss)
    largest = 1
    while largest < heads and sum(math.comb(heads, r) for r in range(1, largest + 2)) <= SEARCHED:
        largest += 1
    known: dict[Group, float] = {}
    for r in range(1, largest + 1):
        weigh(list(combinations(range(heads), r)), loss, known)
    search = _partitions(heads, known)
    found: dict[int, tuple[Group, ...]] = {}
    for n in counts:
        weigh([g for g in joined[n] if g not in known], loss, known)
        cost, groups = search((1 << heads) - 1, n) if n * largest >= heads else (math.inf, ())
        found[n] = groups if cost < sum(known[g] for g in joined[n]) else joined[n]
    return found


def weigh(groups: Sequence[Group], loss: Loss, known: dict[Group, float]) -> None:
    """The losses of ``groups`` into ``known``."""
    for size in {len(g) for g in groups}:
        some = [g for g in groups if len(g) == size]
        for start in range(0, len(some), 256):
            part = some[start : start + 256]
            known.update(zip(part, loss(part).tolist(), strict=True))


def _partitions(heads: int, known: dict[Group, float]) -> Callable[[int, int], tuple[float, tuple[Group, ...]]]:
    """search(set of heads as bits, number of groups) -> (least loss, the groups)."""
    beginning: dict[int, list[tuple[int, Group, float]]] = {h: [] for h in range(heads)}
    for group, cost in known.items():
        beginning[group[0]].append((sum(1 << h for h in group), group, cost))

    @lru_cache(None)
    def search(left: int, count: int) -> tuple[float, tuple[Group, ...]]:
        if not left:
            return (0.0, ()) if count == 0 else (math.inf, ())
        if count == 0 or left.bit_count() < count:
            return math.inf, ()
        best: tuple[float, tuple[Group, ...]] = (math.inf, ())
        for bits, group, cost in beginning[(left & -left).bit_length() - 1]:
            if bits & left == bits and cost < best[0]:
                more, groups = search(left ^ bits, count - 1)
                best = min(best, (cost + more, (group, *groups)), key=lambda x: x[0])
        return best

    return search


def queries_by_norm(norms: Sequence[float], heads: int) -> tuple[int, ...]:
    """KDGQA (arXiv:2408.08454): how many query heads each key/value head gets, by the size of its keys.

    Proportional to the norms above their minimum; then the largest give to empty groups until none is empty.
    """
    least, most = min(norms), max(norms)
    share = [(n - least) / (most - least) if most > least else 1.0 for n in norms]
    total = sum(share)
    counts = [round(heads * s / total) for s in share]
    while sum(counts) != heads or min(counts) < 1:
        if sum(counts) < heads or (min(counts) < 1 and sum(counts) == heads and max(counts) > 1):
            counts[counts.index(min(counts))] += 1
        if sum(counts) > heads:
            counts[counts.index(max(counts))] -= 1
    return tuple(counts)
