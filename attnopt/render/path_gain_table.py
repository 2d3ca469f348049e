"""Gains of paths as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnopt.render.tables import table, to_text

if TYPE_CHECKING:
    from attnopt.report.path_gains import PathGains


def path_gains_text(found: PathGains) -> str:
    """One row a path."""
    rows = [
        (name or "(root)", _text(gain), "given" if name in found.fixed else "fitted") for name, gain in found.items()
    ]
    steps = f"{found.steps} step{'' if found.steps == 1 else 's'}"
    title = f"path gains, mean squared error {found.before:.4g} before and {found.after:.4g} after {steps}"
    return to_text(table(title, ("path", "gain", ""), rows), width=max(80, len(title) + 2))


def _text(gain: float | Sequence[float]) -> str:
    return f"{gain:.4g}" if isinstance(gain, (int, float)) else ", ".join(f"{g:.4g}" for g in gain)
