"""What is said of axes that are not free: those of one input together, and of many relations the shortest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

MOST = 5  # relations that are written out
LONGEST = 160  # characters of one
_FIXED = re.compile(r"(\w+)\[(\d+)\] = (\d+)")


def told(fixed_axes: Sequence[str]) -> tuple[str, ...]:
    """A few lines: ``pixel_values: axes 1-3 fixed at 3 x 32 x 32``, then what has to hold between sizes."""
    lengths: dict[str, dict[int, str]] = {}
    relations = []
    for text in fixed_axes:
        if (found := _FIXED.fullmatch(text)) is None:
            relations.append(text)
        else:
            lengths.setdefault(found[1], {})[int(found[2])] = found[3]
    inputs = [
        f"{name}: {_axes(sizes)} fixed at {' x '.join(sizes[a] for a in sorted(sizes))}"
        for name, sizes in lengths.items()
    ]
    chosen = sorted(relations, key=len)[:MOST]
    written = [_cut(r) for r in relations if r in chosen][:MOST]
    more = len(relations) - len(written)
    return (*_few(inputs), *written, *((f"and {more} more relations between sizes",) if more else ()))


def _few(inputs: Sequence[str]) -> Iterator[str]:
    """As many inputs as relations, or the number of the others."""
    most = 2 * MOST
    yield from inputs[:most]
    if len(inputs) > most:
        yield f"and axes of {len(inputs) - most} more inputs"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _axes(sizes: dict[int, str]) -> str:
    """ "axis 2", "axes 1-3", "axes 0, 2-3"."""
    runs = []
    for _, run in groupby(enumerate(sorted(sizes)), key=lambda pair: pair[1] - pair[0]):
        axes = [axis for _, axis in run]
        runs.append(str(axes[0]) if len(axes) == 1 else f"{axes[0]}-{axes[-1]}")
    return f"{'axis' if len(sizes) == 1 else 'axes'} {', '.join(runs)}"
