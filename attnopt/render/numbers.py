"""Numbers as people read them."""

from __future__ import annotations


def amount(n: float) -> str:
    """1234567 -> "1.23 M"."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.4g}"


def relative(after: float, before: float) -> str:
    """The change in percent, "-25 %"; "" if unchanged or nothing to compare with."""
    if not before or after == before:
        return ""
    return f"{100 * (after / before - 1):+.1f} %"


def percent(share: float) -> str:
    """0.1234 -> "12.3 %"."""
    return f"{100 * share:.3g} %"


def times(share: float) -> str:
    """The reciprocal of a fraction of work: 0.25 -> "4"; "∞" for 0."""
    return f"{1 / share:.3g}" if share else "∞"


def numbers(values: tuple[int, ...]) -> str:
    """Sorted numbers with their runs folded: (0, 2, 3, 4) -> "0, 2-4"."""
    runs: list[list[int]] = []
    for n in sorted(values):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
