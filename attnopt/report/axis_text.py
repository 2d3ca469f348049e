"""The lines of a report about static axes, grouped by input, and about size constraints, the shortest of many."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

MOST = 5  # relations that are written out
LONGEST = 160  # characters per constraint
_FIXED = re.compile(r"(\w+)\[(\d+)\] = (\d+)")


def told(fixed_axes: Sequence[str]) -> tuple[str, ...]:
    """A few lines: ``static axes: pixel_values[1-3] = 3 x 32 x 32``, then constraints between sizes."""
    lengths: dict[str, dict[int, str]] = {}
    relations = []
    for text in fixed_axes:
        if (found := _FIXED.fullmatch(text)) is None:
            relations.append(text)
        else:
            lengths.setdefault(found[1], {})[int(found[2])] = found[3]
    inputs = [
        f"static {'axis' if len(sizes) == 1 else 'axes'}: {name}[{_axes(sizes)}] = {' x '.join(sizes[a] for a in sorted(sizes))}"
        for name, sizes in lengths.items()
    ]
    chosen = sorted(relations, key=len)[:MOST]
    written = [f"size constraint: {_cut(r)}" for r in relations if r in chosen][:MOST]
    more = len(relations) - len(written)
    return (*_few(inputs), *written, *((f"{more} more size constraints",) if more else ()))


def _few(inputs: Sequence[str]) -> Iterator[str]:
    """The first inputs, then the number of the others."""
    most = 2 * MOST
    yield from inputs[:most]
    if len(inputs) > most:
        yield f"static axes of {len(inputs) - most} more inputs"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _axes(sizes: dict[int, str]) -> str:
    """ "2", "1-3", "0, 2-3"."""
    runs = []
    for _, run in groupby(enumerate(sorted(sizes)), key=lambda pair: pair[1] - pair[0]):
        axes = [axis for _, axis in run]
        runs.append(str(axes[0]) if len(axes) == 1 else f"{axes[0]}-{axes[-1]}")
    return ", ".join(runs)
