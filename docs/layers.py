"""The packages of attnopt and their imports, read from the code: a figure and a table."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
WIDTH, LAYER, BOX, GAP, LETTER = 600, 56, 26, 16, 7.3  # of the figure, in pixels
SWEEPS = 12

Item = str | tuple[str, str, int]  # a package, or the place where a line between two packages passes a layer


@dataclass(frozen=True)
class Package:
    """A package or a module: its name below ``attnopt``, its layer from the top, what it is, its lines of code."""

    name: str
    layer: int
    summary: str
    lines: int


def layers() -> list[list[str]]:
    """Top to bottom, from the contract that import-linter checks."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (contract,) = [c for c in contracts if c["type"] == "layers"]
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def packages() -> list[Package]:
    """All of them, top to bottom."""
    return [_package(name, number) for number, layer in enumerate(layers(), 1) for name in layer]


def _package(name: str, layer: int) -> Package:
    texts = {file.name: file.read_text(encoding="utf-8") for file in files(name)}
    first = texts.get("__init__.py") or next(iter(texts.values()))
    summary, _, _ = (ast.get_docstring(ast.parse(first)) or "").partition("\n")
    return Package(name, layer, summary.replace("``", "`"), sum(text.count("\n") for text in texts.values()))


def files(name: str) -> list[Path]:
    """The sources of a package or module; passes and backends lie in folders of their own."""
    path = (ROOT if name in ("passes", "backends") else ROOT / "attnopt").joinpath(*name.split("."))
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports() -> nx.DiGraph[str]:
    """Which package imports which: at the top of a file, in a function, or for types alone."""
    names = [p.name for p in packages()]
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(names)
    for name in names:
        for file in files(name):
            modules = _imported(ast.parse(file.read_text(encoding="utf-8")))
            owners = (n for m in modules for n in names if f"{m}.".startswith(f"attnopt.{n}."))
            graph.add_edges_from((name, owner) for owner in owners if owner != name)
    return graph


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def table() -> str:
    """The packages, layer by layer, as Markdown."""
    rows = [f"| {p.layer} | `{p.name}` | {p.summary} | {p.lines:,} |" for p in packages()]
    return "\n".join(["| layer | package | what it is | lines |", "|---|---|---|---|", *rows])


# ---------------------------------------------------------------- the figure
def figure() -> str:
    """The layers as SVG.  A line is an import that no chain of other imports implies; a box lists all of its own."""
    graph = imports()
    direct = nx.transitive_reduction(graph)
    rows = _ordered(layers(), direct)
    spot = {item: (x, number * LAYER + LAYER / 2) for number, row in enumerate(rows) for item, x in _spread(row)}
    lines = (_line([spot[item] for item in _way(rows, a, b)]) for a, b in direct.edges)
    boxes = (_box(p, spot[p.name], sorted(graph[p.name])) for p in packages())
    height = LAYER * len(rows)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {height}" style="max-width:100%;font:12px monospace" role="img" '
        f'aria-label="The packages of attnopt and their imports">{"".join([*lines, *boxes])}</svg></figure>'
    )


def _ordered(names: list[list[str]], direct: nx.DiGraph[str]) -> list[list[Item]]:
    """Each layer from left to right.  Everything moves to the middle of what it is tied to, so that few lines cross."""
    rows: list[list[Item]] = [list(layer) for layer in names]
    layer_of = {name: number for number, row in enumerate(names) for name in row}
    tied: nx.Graph[Item] = nx.Graph()
    tied.add_nodes_from(layer_of)
    for a, b in direct.edges:
        passed: list[Item] = [(a, b, number) for number in range(layer_of[a] + 1, layer_of[b])]
        for number, item in enumerate(passed, layer_of[a] + 1):
            rows[number].append(item)
        nx.add_path(tied, [a, *passed, b])
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            x = {item: place for other in rows for item, place in _spread(other)}
            wanted = {item: fmean([x[n] for n in tied[item]] or [x[item]]) for item in row}
            row.sort(key=wanted.__getitem__)
    return rows


def _spread(row: list[Item]) -> Iterator[tuple[Item, float]]:
    """Each item with the middle of its place."""
    left = (WIDTH - sum(map(_width, row)) - GAP * (len(row) - 1)) / 2
    for item in row:
        yield item, left + _width(item) / 2
        left += _width(item) + GAP


def _width(item: Item) -> float:
    return LETTER * len(item) + 20 if isinstance(item, str) else 0.0


def _way(rows: list[list[Item]], a: str, b: str) -> list[Item]:
    return [a, *(item for row in rows for item in row if item[:2] == (a, b)), b]


def _line(spots: list[tuple[float, float]]) -> str:
    """Straight past a layer, curved between two."""
    path = ""
    for (x, y), (to_x, to_y) in pairwise(spots):
        start, end = y + BOX / 2, to_y - BOX / 2
        bend = (start + end) / 2
        path += (
            f"{'L' if path else 'M'}{x:.0f} {start:.0f}C{x:.0f} {bend:.0f} {to_x:.0f} {bend:.0f} {to_x:.0f} {end:.0f}"
        )
    return f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity=".5"/>'


def _box(package: Package, spot: tuple[float, float], imported: list[str]) -> str:
    (x, y), width = spot, _width(package.name)
    told = f"{package.summary} Imports {', '.join(imported) or 'nothing of attnopt'}."
    return (
        f'<g><title>{escape(told)}</title><rect x="{x - width / 2:.0f}" y="{y - BOX / 2:.0f}" width="{width:.0f}" '
        f'height="{BOX}" rx="4" fill="#4051b5" fill-opacity=".15" stroke="currentColor"/>'
        f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" fill="currentColor">{package.name}</text></g>'
    )
