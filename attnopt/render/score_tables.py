"""Numbers of heads as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attnopt.render.tables import table, to_text

if TYPE_CHECKING:
    from rich.table import Table

    from attnopt.compiler.head_results import HeadImportance, HeadProfile, HeadSet
    from attnopt.report.head_effects import HeadEffects
    from attnopt.report.head_search import HeadSearch

COLUMNS = 10  # of a profile


def importance_text(importance: HeadImportance) -> str:
    """One row an attention, one column a head."""
    return _by_head(f"head importance: {importance.method}", importance.scores, importance.heads)


def effects_text(found: HeadEffects) -> str:
    """One row an attention, one column a head: the fraction of the difference of the two runs, or the metric itself."""
    base, other = found.ends
    what = f"{found.direction} {found.paths}".rstrip()
    told = f"{what}: clean {found.clean:.4g}, corrupted {found.corrupted:.4g}"
    if base == other:
        return _by_head(f"{told}; the metric", found.metrics, found.heads)
    return _by_head(f"{told}; 0 is {base:.4g}, 1 is {other:.4g}", found.effects, found.heads)


def _by_head(title: str, values: Mapping[str, Sequence[float]], heads: Mapping[str, Sequence[int]]) -> str:
    every = sorted({h for numbers in heads.values() for h in numbers})
    shown = _columns(("site",), tuple(map(str, every)))
    for site, own in values.items():
        of = dict(zip(heads[site], own, strict=True))
        shown.add_row(site or "(root)", *(f"{of[h]:.3g}" if h in of else "" for h in every))
    return _titled(title, shown, 40 + 9 * len(every))


def profile_text(profile: HeadProfile) -> str:
    """One row a head; of many columns some, evenly spaced."""
    longest = max((c.at for c in profile.curves.values()), key=len, default=())
    places = sorted({round(i * (len(longest) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)}) if longest else []
    axis = next((c.axis for c in profile.curves.values()), "")
    some = f", {len(places)} of {len(longest)} columns" if len(places) < len(longest) else ""
    title = f"head profile: {profile.method} by {axis}{some}"
    shown = _columns(("site", "head"), tuple(f"{longest[p]:g}" for p in places))
    for site, curves in profile.curves.items():
        for h, row in zip(profile.heads[site], curves.values, strict=True):
            cells = (f"{row[p]:.3g}" if p < len(row) else "" for p in places)
            shown.add_row(site or "(root)", str(h), *cells)
    return _titled(title, shown, 50 + 9 * len(places))


def set_text(found: HeadSet) -> str:
    """One row a step."""
    shown = _columns(("step", "site", "head"), ("moved",))
    for n, (site, head, moved) in enumerate(found.steps, 1):
        shown.add_row(str(n), site or "(root)", str(head), f"{moved:.3g}")
    return _titled(f"heads found by {found.method}", shown, 80)


def search_text(found: HeadSearch) -> str:
    """One row a step."""
    ended = "" if found.is_complete else ", ended early"
    title = f"{found.method}: {found.base:.6g} without an edit, {found.value:.6g} with {len(found.chosen)} heads{ended}"
    rows = [(f"{s.added[0]} {s.added[1]}", "" if s.removed is None else f"{s.removed[0]} {s.removed[1]}", f"{s.value:.6g}")
            for s in found.steps]  # fmt: skip
    return to_text(table(title, ("head", "instead of", "objective"), rows))


def _columns(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        shown.add_column(name)
    for name in right:
        shown.add_column(name, justify="right")
    return shown


def _titled(title: str, shown: Table, width: int) -> str:
    return f"{title}\n{to_text(shown, width=max(80, width))}"  # a table's own title would wrap to its width
