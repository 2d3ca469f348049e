"""A model beside a file, as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.render.tables import table, to_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.report.audit import Audit, ComparedSite, Difference, Effect

_SETTINGS = {
    "example": "on the example",
    "longer": "both models whole, on a longer example",
    "alone": "this attention alone, random operands",
}


def audit_text(audit: Audit) -> str:
    return to_text(audit_table(audit), width=160)


def audit_table(audit: Audit) -> RenderableType:
    """One row an attention, or a difference of one; then the outputs and the notes."""
    from rich.console import Group
    from rich.text import Text

    rows = [row for site in audit.sites for row in _rows(site)]
    counts = [f"{sum(s.verdict == v for s in audit.sites)} {v}" for v in ("same", "differs", "not compared")]
    title = f"{audit.file}: {audit.verdict} ({', '.join(counts)})"
    heads = ("model", "file", "result", "in the model", "in the file", "effect on its output")
    lines = [_outputs(audit), *(f"note: {note}" for note in audit.notes)]
    lines += [f"note: {s.name or s.file_name}: {note}" for s in audit.sites for note in s.notes]
    return Group(table(title, heads, rows), *(Text(line) for line in lines if line))


def _rows(site: ComparedSite) -> list[tuple[str, ...]]:
    name = site.name or ("(root)" if site.model else "-")
    names = (name, site.file_name or ("(root)" if site.file else "-"))
    if site.differences:
        return [(*(names if i == 0 else ("", "")), *_difference(d)) for i, d in enumerate(site.differences)]
    if site.verdict == "not compared":
        return [(*names, "not compared", site.why, "", "")]
    tokens = ", ".join(f"{n:,}" for n in site.tokens)
    return [(*names, "same", site.model, "", f"none, at {tokens} tokens")]


def _difference(d: Difference) -> tuple[str, ...]:
    return f"differs: {d.kind}", d.model, d.file, "" if d.effect is None else effect_text(d.effect)


def effect_text(effect: Effect) -> str:
    return f"{effect.error:.2%} at {effect.tokens:,} tokens ({_SETTINGS[effect.setting]})"


def _outputs(audit: Audit) -> str:
    if not audit.outputs:
        return "the outputs of the two could not be paired"
    found = ", ".join(f"{o.error:.1e} at {o.tokens:,} tokens" for o in audit.outputs)
    return f"largest relative difference of the outputs, the file in ONNX Runtime: {found}"
