"""The influence of single alternatives: which ones are measured, and what those say of the others."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from attnopt.policy_search.menu import Menu

At = tuple[int, int]  # place, alternative
FLOOR = 0.01  # of the mean influence: logarithms of less are taken for that of it
PULL = 0.1  # of a measurement: what holds places and kinds near the mean


def chosen(menu: Menu, most: int) -> list[At]:
    """At most about ``most`` of the alternatives, as many at each place, and other ones from place to place, so that each is
    measured somewhere."""
    singles = [[(u, a) for a in own if a] for u, own in enumerate(menu.allowed)]
    open_places = [own for own in singles if own]
    if sum(map(len, open_places)) <= most:
        return [at for own in open_places for at in own]
    each = max(1, most // max(1, len(open_places)))
    step = max(1, math.ceil(len(open_places) * each / max(1, most)))  # of places, where there are too many
    found: list[At] = []
    for n, own in enumerate(open_places[::step]):
        stride = len(own) / min(each, len(own))
        found += dict.fromkeys(own[int(n + i * stride) % len(own)] for i in range(min(each, len(own))))
    return found


def completed(known: Mapping[At, float], asked: Mapping[At, Hashable]) -> dict[At, float]:
    """The influence of each of ``asked``, given by its kind: what is known, else as if its logarithm were a sum over place
    and kind, fitted to what is known."""
    if not asked:
        return {}
    values = [abs(v) for v in known.values() if math.isfinite(v)]
    mean = sum(values) / len(values) if values else 1.0
    least = FLOOR * mean or 1.0
    places, kinds = _numbered(u for u, _ in asked), _numbered(asked.values())
    width = len(places) + len(kinds)
    rows, logs = [np.sqrt(PULL) * row for row in np.eye(width)], [0.0] * width
    center = float(np.mean([math.log(max(v, least)) for v in known.values() if math.isfinite(v)] or [math.log(least)]))
    for at, v in known.items():
        if at in asked and math.isfinite(v):
            row = np.zeros(width)
            row[places[at[0]]] = row[len(places) + kinds[asked[at]]] = 1.0
            rows.append(row)
            logs.append(math.log(max(v, least)) - center)
    found = np.linalg.lstsq(np.array(rows), np.array(logs), rcond=None)[0]
    return {
        at: known[at] if at in known else math.exp(center + found[places[at[0]]] + found[len(places) + kinds[kind]])
        for at, kind in asked.items()
    }


def kinds_of(menu: Menu, uniform: Sequence[Sequence[int]]) -> dict[At, Hashable]:
    """Of each alternative the first uniform policy that has it; without one, a kind of its own."""
    found: dict[At, Hashable] = {}
    for u, own in enumerate(menu.allowed):
        for a in own:
            if a:
                found[u, a] = next((k for k, picks in enumerate(uniform) if picks[u] == a), (u, a))
    return found


def _numbered(values: Iterable[Hashable]) -> dict[Hashable, int]:
    return {value: n for n, value in enumerate(dict.fromkeys(values))}
