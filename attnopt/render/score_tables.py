"""Numbers of heads as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.render.tables import to_text

if TYPE_CHECKING:
    from rich.table import Table

    from attnopt.compiler.head_results import HeadImportance, HeadProfile, HeadSet

COLUMNS = 10  # of a profile


def importance_text(importance: HeadImportance) -> str:
    """One row an attention, one column a head."""
    every = sorted({h for numbers in importance.heads.values() for h in numbers})
    shown = _columns(("site",), tuple(map(str, every)))
    for site, scores in importance.scores.items():
        of = dict(zip(importance.heads[site], scores, strict=True))
        shown.add_row(site or "(root)", *(f"{of[h]:.3g}" if h in of else "" for h in every))
    return _titled(f"head importance: {importance.method}", shown, 40 + 9 * len(every))


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
