"""The report as one HTML page, and what notebooks show of reports, inspections and patterns: no network, no script."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from attnopt.axes_told import told

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from attnopt.inspection import Inspection
    from attnopt.pattern import Pattern
    from attnopt.report import Report

NOTEBOOK_LENGTH = 64  # of the sequence that a pattern is drawn for where nobody says how long it is


def report_page(report: Report) -> str:
    """The whole page.  Everything that comes from the report is escaped."""
    from attnopt.page_view import lanes, measures, policy_text, site_views

    views = site_views(report)
    return _render(
        "report.html.j2",
        report=report,
        fixed_axes=told(report.fixed_axes),
        views=views,
        lanes=lanes(views),
        measures=measures(report),
        policy=policy_text(report.policy),
    )


def framed(page: str) -> str:
    """A whole page inside another one, such as a notebook, neither touching the other's style."""
    from markupsafe import escape

    return f'<iframe srcdoc="{escape(page)}" title="attnopt report" style="width:100%;height:36rem;border:0"></iframe>'


def pattern_fragment(pattern: Pattern, length: int = NOTEBOOK_LENGTH) -> str:
    """A pattern's picture at a sequence of ``length``, with its name and density."""
    from attnopt.drawing import pictures

    drawn = pictures(pattern, length, length, max(1, pattern.named_heads))
    return _render("pattern.html.j2", pictures=drawn, pattern=str(pattern), length=length)


def inspection_fragment(inspection: Inspection) -> str:
    """What was found, as a table with pictures."""
    from attnopt.drawing import pictures
    from attnopt.tables import pattern_text, spec_extras

    rows = [
        (s, pattern_text(s.spec), spec_extras(s.spec), pictures(pattern_text(s.spec), s.q_len, s.kv_len, s.num_heads))
        for s in inspection.sites
    ]
    return _render("inspection.html.j2", rows=rows, inspection=inspection)


def picture_svg(pattern: Pattern, length: int) -> str:
    """The pictures of a pattern alone, as SVG in the colour of the text around them."""
    from attnopt.drawing import pictures

    return _render("svg.html.j2", pictures=pictures(pattern, length, length, max(1, pattern.named_heads)))


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("attnopt"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        amount=amount, relative=relative, breakable=_breakable, percent=percent, numbers=numbers, times=times
    )
    return environment


def _breakable(name: str) -> Markup:
    """A qualified name that may be broken after a dot."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=\.)", name))


def amount(n: float) -> str:
    """1234567 -> "1.23 M"."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.4g}"


def relative(after: float, before: float) -> str:
    """The change in per cent, "-25 %"; "" where there is none or nothing to compare with."""
    if not before or after == before:
        return ""
    return f"{100 * (after / before - 1):+.1f} %"


def percent(share: float) -> str:
    """0.1234 -> "12.3 %"."""
    return f"{100 * share:.3g} %"


def times(share: float) -> str:
    """How many times less a share of the work is: 0.25 -> "4"; "∞" for none at all."""
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
