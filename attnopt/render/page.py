"""The report as one HTML page, and notebook views of reports, inspections and patterns: no network, no scripts."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from attnopt.render.numbers import amount, numbers, percent, relative, times
from attnopt.report.axis_text import told

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from attnopt.patterns.algebra import Pattern
    from attnopt.report.inspection import Inspection
    from attnopt.report.report import Report

NOTEBOOK_LENGTH = 64  # default sequence length of a drawn pattern


def report_page(report: Report) -> str:
    """The whole page.  Everything that comes from the report is escaped."""
    from attnopt.render.page_view import lanes, measures, policy_text, site_views

    views = site_views(report)
    return rendered(
        "report.html.j2",
        report=report,
        fixed_axes=told(report.fixed_axes),
        views=views,
        lanes=lanes(views),
        measures=measures(report),
        policy=policy_text(report.policy),
    )


def report_frame(report: Report) -> str:
    """The page embedded in another one, such as a notebook."""
    return framed(report_page(report))


def framed(page: str, title: str = "attnopt report") -> str:
    """A whole page embedded in another one, with isolated styles."""
    from markupsafe import escape

    own = page.replace("<head>", '<head>\n<base href="about:srcdoc">', 1)  # or its links would lead to the outer page
    return f'<iframe srcdoc="{escape(own)}" title="{title}" style="width:100%;height:36rem;border:0"></iframe>'


def pattern_fragment(pattern: Pattern, length: int = NOTEBOOK_LENGTH) -> str:
    """A pattern's picture at a sequence of ``length``, with its name and density."""
    from attnopt.render.pattern_cells import pictures

    drawn = pictures(pattern, length, length, max(1, pattern.named_heads))
    return rendered("pattern.html.j2", pictures=drawn, pattern=str(pattern), length=length)


def inspection_fragment(inspection: Inspection) -> str:
    """What was found, as a table with pictures."""
    from attnopt.render.pattern_cells import pictures

    rows = [
        (s, s.spec, pictures(str(s.spec.visible_pattern), s.q_len, s.kv_len, s.num_heads)) for s in inspection.sites
    ]
    return rendered("inspection.html.j2", rows=rows, inspection=inspection)


def picture_svg(pattern: Pattern, length: int) -> str:
    """The pictures of a pattern as SVG, in the surrounding text colour."""
    from attnopt.render.pattern_cells import pictures

    return rendered("svg.html.j2", pictures=pictures(pattern, length, length, max(1, pattern.named_heads)))


def rendered(template: str, **values: object) -> str:
    """A template of this package with these values, which are escaped."""
    return _environment().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("attnopt.render"),
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
