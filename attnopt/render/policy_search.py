"""What a search for a policy found, as a table and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnopt.render.numbers import amount
from attnopt.render.page import framed, rendered
from attnopt.render.tables import table, to_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.report.policy_search import SearchReport, Tried

WIDTH = 140


def search_text(report: SearchReport) -> str:
    return to_text(search_table(report), WIDTH)


def search_table(report: SearchReport) -> RenderableType:
    """The policy by attention, the front, and what was refused."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(headline(report))]
    if report.best is not None:
        parts.append(
            table("Policy", ("attention", "passes"), [(s or "(root)", p) for s, p in report.best.choices.items()])
        )
    names = tuple(report.limits)
    rows = [(*(cost(report, n, t) for n in names), f"{t.divergence:.4g}", _mark(report, t)) for t in report.front]
    parts.append(table("Front", (*names, "divergence", ""), rows))
    if report.refused:
        parts.append(
            table("Refused", ("attention", "passes", "reason"), [(s or "(root)", p, r) for s, p, r in report.refused])
        )
    parts += [Text(f"note: {note}") for note in report.notes]
    return Group(*parts)


def headline(report: SearchReport) -> str:
    """One line for each: what was asked, what was found."""
    ended = "" if report.is_complete else ", ended early"
    lines = [
        f"budget: {report.budget}; {report.measure}",
        f"{report.policies} policies in {report.evaluations:.1f} evaluations and {report.seconds:.0f} s{ended}",
    ]
    if report.best is None:
        return "\n".join([*lines, "no policy within the budget was judged"])
    told = f"found: {report.best.divergence:.4g} at {_costs(report, report.best)}"
    if report.uniform is not None:
        told += f"; the best uniform policy: {report.uniform.divergence:.4g} at {_costs(report, report.uniform)}"
    lines.append(told)
    if report.latency:
        measured, predicted = report.latency["measured"], report.latency["predicted"]
        lines.append(
            f"latency of the whole model: {measured:.4g} ms measured, {predicted:.4g} ms as a sum of its parts"
        )
    return "\n".join(lines)


def _costs(report: SearchReport, tried: Tried) -> str:
    return ", ".join(f"{name} {cost(report, name, tried)}" for name in report.limits)


def cost(report: SearchReport, name: str, tried: Tried) -> str:
    """An amount, and its share of the original's."""
    now, was = tried.costs[name], report.original[name]
    told = f"{now:.4g} ms" if name == "latency" else amount(int(now))
    return f"{told} ({now / was:.3g})" if was else told


def _mark(report: SearchReport, tried: Tried) -> str:
    marks = {"found": report.best, "best uniform": report.uniform}
    return ", ".join(name for name, one in marks.items() if one == tried)


def search_page(report: SearchReport) -> str:
    """The whole page.  Everything that comes from the report is escaped."""
    return rendered("search.html.j2", report=report, points=_points(report), cost=cost)


def search_frame(report: SearchReport) -> str:
    return framed(search_page(report))


def _points(report: SearchReport) -> list[Mapping[str, object]]:
    """The front in a box of 600 x 240: cheap on the left, far from the original above."""
    if not report.front:
        return []
    name = next(iter(report.limits))
    costs = [t.costs[name] for t in report.front]
    least, most = min(costs), max(costs)
    worst = max((t.divergence for t in report.front), default=0.0)
    lowest = min((t.divergence for t in report.front), default=0.0)
    return [
        {
            "x": round(30 + 540 * (c - least) / ((most - least) or 1.0), 1),
            "y": round(220 - 190 * (t.divergence - lowest) / ((worst - lowest) or 1.0), 1),
            "cost": cost(report, name, t),
            "divergence": f"{t.divergence:.4g}",
            "found": t == report.best,
        }
        for t, c in zip(report.front, costs, strict=True)
    ]
