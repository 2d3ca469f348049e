"""The sdist and the wheel made from it hold what they should, and the wheel works by itself, away from the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from places import ROOT

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
USE = """
import pathlib, sys, torch, attnopt
assert pathlib.Path(attnopt.__file__).is_relative_to(sys.argv[1]), attnopt.__file__
model = torch.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval()
fast = attnopt.optimize(model, "local-window(left=2)", torch.randn(1, 12, 16), backend="sdpa")
assert fast.report.count("rewritten") == 1, str(fast.report)
page = fast.report.to_html("report.html").read_text("utf-8")
assert "<svg" in page and "prefers-color-scheme" in page
"""


def _run(command: list[str], folder: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because a build writes beside the source."""
    folder = tmp_path_factory.mktemp("source")
    skipped = shutil.ignore_patterns(".*", "build", "dist", "node_modules", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=skipped)
    _run([sys.executable, "-c", BUILD, "build_sdist", str(folder / "dist")], source)
    (made,) = (folder / "dist").glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    unpacked = sdist.parent / sdist.name.removesuffix(".tar.gz")
    _run([sys.executable, "-c", BUILD, "build_wheel", str(sdist.parent)], unpacked)
    (made,) = sdist.parent.glob("*.whl")
    return made


@pytest.mark.subprocess
def test_the_wheel_holds_every_module_once_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = archive.read(metadata).decode()
    core = [f for f in (ROOT / "attnopt").rglob("*") if f.suffix in (".py", ".typed", ".j2")]  # follows no links
    wanted = {f.relative_to(ROOT).as_posix() for f in core}
    for folder in ("passes", "backends"):
        wanted |= {f"attnopt/{folder}/{f.name}" for f in (ROOT / folder).iterdir() if f.suffix in (".py", ".cpp", ".h")}
    assert sorted(names) == sorted(wanted)
    assert "License-Expression: Apache-2.0" in about
    assert "Provides-Extra: plot" in about
    assert "# attnopt" in about  # the README


@pytest.mark.subprocess
def test_the_sdist_holds_the_licence_and_the_readme(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "passes/fuse.py", "backends/sdpa.py"} <= names


@pytest.mark.slow
@pytest.mark.subprocess
def test_the_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    _run([*pip, str(wheel)], tmp_path)
    assert (site / "bin" / "attnopt").is_file()
    _run([sys.executable, "-W", "ignore", "-c", USE, str(site)], tmp_path, PYTHONPATH=str(site))


def test_the_version_stands_everywhere() -> None:
    import tomllib

    import yaml

    from attnopt import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert project["version"] == citation["version"] == __version__
    assert project["license"] == citation["license"]
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text("utf-8")
