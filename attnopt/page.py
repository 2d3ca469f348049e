"""The report as one HTML page: no network, no script."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

    from attnopt.report import Cost, Report


def report_page(report: Report) -> str:
    """The whole page.  Everything that comes from the report is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("attnopt"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(amount=amount, relative=relative, breakable=_breakable)
    return environment.get_template("report.html.j2").render(
        report=report,
        costs=_costs(report.cost_before, report.cost_after),
        policy=json.dumps(report.to_json()["policy"], indent=2, ensure_ascii=False),
    )


def _breakable(name: str) -> Markup:
    """A qualified name that may be broken after a dot."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=\.)", name))


def amount(n: float) -> str:
    """1234567 -> "1.23 M"."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"


def relative(after: float, before: float) -> str:
    """The change in per cent, "-25 %"; "" where there is none or nothing to compare with."""
    if not before or after == before:
        return ""
    return f"{100 * (after / before - 1):+.1f} %"


def _costs(before: Cost, after: Cost) -> list[tuple[str, int, int]]:
    return [
        ("FLOPs of one call", before.flops, after.flops),
        ("parameters", before.parameters, after.parameters),
        ("K/V bytes a token", before.kv_bytes_per_token, after.kv_bytes_per_token),
    ]
