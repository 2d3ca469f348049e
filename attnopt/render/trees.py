"""An inspection as a tree of the model's modules, and an explanation as the way that matching took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text
    from rich.tree import Tree

    from attnopt.compiler.explain import Explanation
    from attnopt.graph.listing import Hunk
    from attnopt.ir.refusal import Refusal
    from attnopt.ir.site import NearMiss, Site
    from attnopt.report.inspection import Inspection

ROOT = "(root)"


@dataclass
class _Module:
    """What is shown of a module: lines about itself, and the modules in it."""

    lines: list[tuple[str, str]] = field(default_factory=list)  # style, text
    inner: dict[str, _Module] = field(default_factory=dict)

    def at(self, name: str) -> _Module:
        found = self
        for part in name.split(".") if name else ():
            found = found.inner.setdefault(part, _Module())
        return found


def inspection_tree(inspection: Inspection) -> RenderableType:
    """Modules and the attentions in them; neighbours that are alike are drawn once, as "0-11"."""
    from rich.console import Group
    from rich.text import Text
    from rich.tree import Tree

    root = _Module()
    for site in inspection.sites:
        owner, _, number = site.name.partition("#")
        line = _site_line(site)
        root.at(owner).lines.append(("green", f"#{number} {line}" if number else line))
        root.at(owner).lines += [("yellow", note) for note in _site_notes(site)]
    for miss in inspection.near_misses:
        root.at(miss.name).lines.append(("red", _miss_line(miss)))
    found, missed = len(inspection.sites), len(inspection.near_misses)
    title = f"{found} attention{'' if found == 1 else 's'} in {inspection.candidates} candidates"
    title += f", {missed} near miss{'' if missed == 1 else 'es'}" if missed else ""
    if not root.inner and not root.lines:
        return Text(title)
    tree = Tree(Text("model", style="bold"))
    _grow(tree, root)
    return Group(Text(title), tree)


def _grow(tree: Tree, module: _Module) -> None:
    from rich.text import Text

    for style, text in module.lines:
        tree.add(Text(text, style=style))
    for names, inner in _alike(module.inner):
        _grow(tree.add(Text(names, style="bold")), inner)


def _alike(modules: dict[str, _Module]) -> Iterable[tuple[str, _Module]]:
    """Neighbours of equal content as one, and each chain of only children as one name."""
    shortened = [_shortened(name, module) for name, module in modules.items()]
    for _, run in groupby(shortened, key=lambda pair: (_stem(pair[0]), _content(pair[1]))):
        members = list(run)
        (first, module), (last, _) = members[0], members[-1]
        number, _, rest = first.partition(".")
        folded = f"{number}-{last.partition('.')[0]}" + (f".{rest}" if rest else "")
        yield (folded if len(members) > 1 else first), module


def _shortened(name: str, module: _Module) -> tuple[str, _Module]:
    while not module.lines and len(module.inner) == 1:
        ((inner, module),) = module.inner.items()
        name = f"{name}.{inner}"
    return name, module


def _stem(name: str) -> str:
    """Equal for names that differ in a first number only."""
    number, dot, rest = name.partition(".")
    return f"{dot}{rest}" if number.isdecimal() else f"={name}"


def _content(module: _Module) -> object:
    return tuple(module.lines), tuple((name, _content(inner)) for name, inner in module.inner.items())


def _site_line(site: Site) -> str:
    return str(site.spec) + (f"   {site.where}" if site.where else "")


def _site_notes(site: Site) -> list[str]:
    unknown = [f"{role} is unknown: {p.why}" for role, p in site.projections.items() if p.rows is None and p.why]
    return [*unknown, *site.notes]


def _miss_line(miss: NearMiss) -> str:
    return f"near miss {_one_line(miss.refusal)}"


def _one_line(refusal: Refusal) -> str:
    return str(refusal).replace("\n  hint: ", "; ")


def explanation_text(explanations: Sequence[Explanation]) -> RenderableType:
    """What matching went through, then who refuses it and why."""
    from rich.console import Group

    return Group(*(part for e in explanations for part in _explained(e)))


def _explained(e: Explanation) -> Iterable[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    yield Text(f"{e.name or ROOT}   {e.where}".rstrip(), style="bold")
    yield Text(f"  {e.kind}{': ' + e.spec if e.spec else ''}")
    title = "what was matched" if e.kind == "attention" else "from the softmax anchor to the first difference"
    yield Text(f"\n  {title}", style="dim")
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for step in e.steps:
        style = "bold red" if step.differs else ""
        mark = "  !" if step.differs else ""
        table.add_row(*(Text(cell, style=style) for cell in (mark, step.code, step.where, step.source)))
    yield table
    yield Text("")
    for stage, refusal in e.refusals.items():
        yield Text(f"  {stage} refuses it: {_one_line(refusal)}", style="red")
    if e.accepted:
        yield Text(f"  accepted by {', '.join(e.accepted)}", style="green")
    for note in e.notes:
        yield Text(f"  note: {note}", style="yellow")


def hunks_text(hunks: Sequence[Hunk]) -> RenderableType:
    """Each change with the attention that it belongs to."""
    from rich.console import Group

    return Group(*(line for hunk in hunks for line in _hunk_lines(hunk)))


def _hunk_lines(hunk: Hunk) -> Iterable[Text]:
    from rich.text import Text

    title = f"@@ {hunk.module or ROOT}" if hunk.site is None else f"@@ {hunk.site or ROOT}: {hunk.passes}"
    yield Text(f"{title}   {hunk.where}".rstrip() + " @@", style="bold cyan")
    styles = {"-": "red", "+": "green", " ": "dim"}
    for sign, line in hunk.lines:
        yield Text(f"{sign} {line.text}", style=styles[sign])
