"""Inspections and reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attnopt.render.numbers import amount, relative
from attnopt.report.report import Report, SiteReport

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.compiler.plugins import Description
    from attnopt.ir.projection import Projection
    from attnopt.ir.site import NearMiss, Site
    from attnopt.report.advice import Advice
    from attnopt.report.inspection import Inspection

ROLES = ("q", "k", "v", "out")


def inspection_text(inspection: Inspection) -> str:
    return to_text(inspection_table(inspection))


def advice_text(advice: Advice) -> str:
    return to_text(advice_table(advice))


def inspection_table(inspection: Inspection) -> RenderableType:
    """One row per attention; near misses in a second table."""
    from rich.console import Group

    rows = [_inspected(site) for site in inspection.sites]
    head = ("attention", "heads", "head size", "kind", "pattern", "extras", "scale", "projections", "source")
    title = f"{len(rows)} attention{'' if len(rows) == 1 else 's'} in {inspection.candidates} candidates"
    parts: list[RenderableType] = [table(title, head, rows)]
    if notes := _notes(inspection.sites):
        parts.append(table("Notes", ("note", "of"), notes))
    if inspection.near_misses:
        parts.append(_misses(inspection.near_misses))
    return Group(*parts)


def _notes(sites: Sequence[Site]) -> list[tuple[str, str]]:
    """Each note once, with the sites that it is about."""
    about: dict[str, list[str]] = {}
    for site in sites:
        for note in site.notes:
            about.setdefault(note, []).append(site.name or "(root)")
    return [(note, "all" if len(names) == len(sites) else ", ".join(names)) for note, names in about.items()]


def report_table(report: Report) -> RenderableType:
    """One row per attention: what was done, and its cost."""
    from rich.console import Group

    rows = [_reported(site) for site in report.sites]
    head = ("attention", "status", "passes", "before", "after", "FLOPs", "parameters", "error")
    parts: list[RenderableType] = [table(report.headline, head, rows)]
    refusals = [
        (site.name or "(root)", stage, str(refusal))
        for site in report.sites
        for stage, refusal in site.refusals.items()
    ]
    if refusals:
        parts.append(table("Refused", ("attention", "by", "reason"), refusals))
    if report.near_misses:
        parts.append(_misses(report.near_misses))
    return Group(*parts)


def advice_table(advice: Advice) -> RenderableType:
    """The reachable speed-up of each kernel, and better fitting patterns."""
    from rich.console import Group

    lengths = f"{advice.q_len} queries and {advice.kv_len} keys"
    title = f"{advice.pattern}, {lengths}: density {advice.density:.3g}, at most {advice.bound:.2f} times faster"
    rows = [(k.kernel, f"{k.share:.3g}", f"{k.speedup:.2f}", f"{k.of_bound:.0%}") for k in advice.kernels]
    parts: list[RenderableType] = [table(title, ("kernel", "computes", "speed-up", "of the bound"), rows)]
    if advice.better:
        better = [(b.kernel, b.pattern, f"{b.density:.3g}", f"{b.speedup:.2f}") for b in advice.better]
        parts.append(table("Fits better", ("kernel", "pattern", "density", "speed-up"), better))
    return Group(*parts)


def to_text(table: RenderableType, width: int = 120) -> str:
    """What the table looks like without colour."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def inspection_json(inspection: Inspection) -> dict[str, object]:
    """An inspection as plain dicts, lists, strings and numbers."""
    return {
        "sites": [_site_json(site) for site in inspection.sites],
        "near_misses": [
            {"name": miss.name, "where": miss.where, "refusal": miss.refusal.to_json()}
            for miss in inspection.near_misses
        ],
        "candidates": inspection.candidates,
    }


def _site_json(site: Site) -> dict[str, object]:
    return {
        "name": site.name,
        "where": site.where,
        "num_heads": site.num_heads,
        "num_kv_heads": site.num_kv_heads,
        "kv_of_head": list(site.spec.kv_of_head),
        "head_dim": site.head_dim,
        "value_dim": site.value_dim,
        "scale": site.scale,
        "is_cross": site.is_cross,
        "pattern": str(site.spec.visible_pattern),
        "extras": [*site.spec.features, *site.spec.positions],
        "projections": {
            role: {"weight": p.weight, "bias": p.bias, "transposed": p.transposed, "rows": p.rows, "why": p.why}
            for role, p in site.projections.items()
        },
        "refusals": {name: refusal.to_json() for name, refusal in site.refusals.items()},
        "notes": list(site.notes),
    }


def _inspected(site: Site) -> tuple[str, ...]:
    spec = site.spec
    return (
        site.name or "(root)",
        str(spec.num_heads) if spec.num_heads == spec.num_kv_heads else f"{spec.num_heads} / {spec.num_kv_heads} kv",
        spec.sizes,
        "cross" if spec.is_cross else "self",
        str(spec.visible_pattern),
        ", ".join((*spec.features, *spec.positions)),
        f"{spec.scale:.4g}",
        _projections(site.projections),
        site.where,
    )


def _reported(site: SiteReport) -> tuple[str, ...]:
    before, after = site.cost_before, site.cost_after
    return (
        site.name or "(root)",
        site.status,
        ", ".join(site.passes),
        site.spec_before,
        "the same" if site.spec_after == site.spec_before else site.spec_after,
        f"{amount(after.flops)} {relative(after.flops, before.flops)}".rstrip(),
        f"{amount(after.parameters)} {relative(after.parameters, before.parameters)}".rstrip(),
        "" if site.error is None else f"{site.error:.1e}",
    )


def _projections(projections: Mapping[str, Projection]) -> str:
    known = {role: role in projections and projections[role].rows is not None for role in ROLES}
    return " ".join(role if known[role] else f"{role}?" for role in ROLES)


def _misses(misses: tuple[NearMiss, ...]) -> RenderableType:
    rows = [(miss.name or "(root)", miss.refusal.code, _reason(miss), miss.where) for miss in misses]
    return table("Near misses (rejected candidates)", ("place", "code", "reason", "source"), rows)


def _reason(miss: NearMiss) -> str:
    return str(miss.refusal).removeprefix(f"[{miss.refusal.code}]").strip()


def table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> RenderableType:
    """Columns in which every cell is empty are left out; without rows there is only the title."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return Text(title)
    shown = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i in shown:
        longest = max((len(row[i]) for row in rows), default=0)
        table.add_column(head[i], overflow="fold", no_wrap=longest <= (12 if i else 40))
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    return Group(Text(title), table)  # a table's own title would wrap to its width


def plugin_table(found: Sequence[Description]) -> RenderableType:
    """The installed passes and backends, and other third-party plugins; those that cannot be loaded show the reason."""
    from rich.console import Group

    passes = [_plugin(one) for one in found if one.kind == "pass"]
    backends = [_plugin(one) for one in found if one.kind == "backend"]
    head = ("name", "exact", "options", "summary", "from")
    others = [_plugin(one) for one in found if one.kind not in ("pass", "backend")]
    tables = [table("Passes", head, passes), table("Backends", head, backends)]
    return Group(*tables, *([table("Others", head, others)] if others else []))


def _plugin(one: Description) -> tuple[str, ...]:
    exact = {True: "yes", False: "no", None: ""}[one.exact]
    options = ", ".join(f"{name}={default}" for name, default in one.options.items())
    return (one.name, exact, options, f"cannot be loaded: {one.error}" if one.error else one.summary, one.distribution)
