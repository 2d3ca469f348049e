"""The registry: built-in names, third parties' entry points, and what is said of broken ones."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

from attnopt.backends import Sdpa
from attnopt.compiler import plugins
from attnopt.compiler.policy import Policy
from attnopt.errors import PluginError, PolicyError
from attnopt.passes import LocalWindow

ACME = '''
"""A third party's module."""
from dataclasses import dataclass
from typing import ClassVar
from attnopt.patterns import Window
from attnopt.ir.interfaces import Pass, Rewrite

@dataclass(frozen=True)
class LastK(Pass):
    """Each query sees itself and the ``keys - 1`` keys before it."""
    name: ClassVar[str] = "acme.last-k"
    exact: ClassVar[bool] = False
    keys: int

    def rewrite(self, site):
        return Rewrite(site.spec.restricted(Window(left=self.keys - 1, right=0)))
'''


def install(root: Path, distribution: str, group: str, entries: dict[str, str]) -> None:
    """What pip leaves behind of a distribution with these entry points."""
    info = root / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_built_in_names() -> None:
    assert list(plugins.passes())[:7] == [
        "fuse",
        "local-window",
        "sparse",
        "dynamic-sparse",
        "prune-heads",
        "grouped-query",
        "scale-heads",
    ]
    assert list(plugins.backends())[:2] == ["reference", "sdpa"]
    assert plugins.load_pass("local-window") is LocalWindow
    assert plugins.load_backend("sdpa") is Sdpa
    assert all(plugins.load_pass(name).name == name for name in plugins.passes())
    assert all(plugins.load_backend(name).name == name for name in plugins.backends())


def test_pyproject_says_the_same() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["attnopt.passes"] == {
        n: p.target for n, p in plugins.passes().items() if p.distribution == "attnopt"
    }
    assert declared["attnopt.backends"] == {
        n: p.target for n, p in plugins.backends().items() if p.distribution == "attnopt"
    }


def test_listing_imports_nothing(site_packages: Path) -> None:
    (site_packages / "acme_loud.py").write_text("raise AssertionError('imported')\n")
    install(site_packages, "acme", "attnopt.passes", {"loud": "acme_loud:Loud"})
    install(site_packages, "acme2", "attnopt.backends", {"loud": "acme_loud:Loud"})
    before = set(sys.modules)
    assert "loud" in plugins.passes()
    assert "loud" in plugins.backends()
    assert not {name for name in set(sys.modules) - before if name.startswith(("attnopt", "acme"))}


def test_third_party_pass(site_packages: Path) -> None:
    (site_packages / "acme_lastk.py").write_text(ACME)
    install(site_packages, "acme", "attnopt.passes", {"acme.last-k": "acme_lastk:LastK"})
    assert plugins.passes()["acme.last-k"].distribution == "acme"
    made = plugins.load_pass("acme.last-k")(keys=4)  # type: ignore[call-arg]
    assert Policy.of("acme.last-k(keys=4)").passes_for("") == (made,)
    assert Policy.from_json(Policy.of(made).to_json()) == Policy.of(made)
    row = next(d for d in plugins.describe() if d.name == "acme.last-k")
    assert row == plugins.Description(
        "pass",
        "acme.last-k",
        False,
        {"keys": "required"},
        "Each query sees itself and the ``keys - 1`` keys before it.",
        "acme",
    )


def test_broken_plugins(site_packages: Path) -> None:
    (site_packages / "acme_broken.py").write_text("import nowhere_to_be_found\n")
    (site_packages / "acme_wrong.py").write_text("NotAPass = 3\n")
    entries = {"broken": "acme_broken:X", "wrong": "acme_wrong:NotAPass", "gone": "acme_wrong:Gone"}
    install(site_packages, "acme", "attnopt.passes", entries)
    install(site_packages, "rival", "attnopt.passes", {"wrong": "acme_wrong:NotAPass"})
    with pytest.raises(PluginError) as caught:
        plugins.load_pass("broken")
    assert str(caught.value) == (
        "pass 'broken' of acme (acme_broken:X) cannot be loaded: "
        "ModuleNotFoundError: No module named 'nowhere_to_be_found'"
        "\n  hint: fix or uninstall acme"
    )
    with pytest.raises(PluginError, match=r"pass 'gone' of acme \(acme_wrong:Gone\) cannot be loaded: AttributeError"):
        plugins.load_pass("gone")
    with pytest.raises(PluginError, match=r"pass 'wrong' is defined by (acme, rival|rival, acme)"):
        plugins.load_pass("wrong")
    rows = {d.name: d for d in plugins.describe()}
    assert "cannot be loaded" in rows["broken"].error
    assert rows["broken"].exact is None
    assert rows["fuse"].error == ""


def test_what_is_no_backend(site_packages: Path) -> None:
    (site_packages / "acme_number.py").write_text("number = 3\n")
    install(site_packages, "acme", "attnopt.backends", {"number": "acme_number:number"})
    with pytest.raises(PluginError, match="acme_number:number of acme is not a subclass of attnopt's Backend"):
        plugins.load_backend("number")


def test_nobody_can_replace_a_built_in(site_packages: Path) -> None:
    install(site_packages, "acme", "attnopt.passes", {"fuse": "acme_fuse:Fuse"})
    with pytest.raises(PluginError, match="pass 'fuse' is defined by attnopt, acme"):
        plugins.load_pass("fuse")


def test_unknown_names() -> None:
    with pytest.raises(PolicyError) as caught:
        plugins.load_pass("local-windows")
    assert "unknown pass 'local-windows'; available: fuse, local-window, sparse," in str(caught.value)
    assert "hint: did you mean local-window?" in str(caught.value)
    with pytest.raises(PolicyError, match="unknown backend 'zzz'; available: reference, sdpa"):
        plugins.load_backend("zzz")


def test_a_fault_of_our_own_pass_surfaces_where_it_is_debugged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalWindow, "typical", classmethod(lambda cls: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        plugins.typical_pass("local-window")
    monkeypatch.delenv("ATTNOPT_DEBUG")
    assert plugins.typical_pass("local-window") is None


def test_listing_is_data() -> None:
    rows = {d.name: d for d in plugins.describe()}
    assert rows["local-window"].options == {
        "left": "required",
        "right": "None",
        "sinks": "0",
        "dilation": "1",
        "heads": "None",
        "share": "0.0",
    }
    assert rows["fuse"].exact is True
    assert rows["sdpa"].exact is None
    assert all(row.summary.endswith(".") for row in rows.values())
