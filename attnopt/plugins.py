"""Passes and backends by name: attnopt's own, and those that other installed distributions offer through entry points.

A third party writes ``[project.entry-points."attnopt.passes"]`` and ``acme.last-k = "acme:LastK"`` in its pyproject.
Listing names imports nothing.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from attnopt.errors import PluginError, PolicyError
from attnopt.rewriting import Backend, Pass

OURS = "attnopt"

# Also in pyproject.toml; here for a checkout that is not installed.
_BUILT_IN = {
    "attnopt.passes": {
        "fuse": "attnopt.passes.fuse:Fuse",
        "local-window": "attnopt.passes.local_window:LocalWindow",
        "sparse": "attnopt.passes.sparse:Sparse",
        "dynamic-sparse": "attnopt.passes.dynamic_sparse:DynamicSparse",
        "prune-heads": "attnopt.passes.prune_heads:PruneHeads",
        "grouped-query": "attnopt.passes.grouped_query:GroupedQuery",
        "scale-heads": "attnopt.passes.scale_heads:ScaleHeads",
        "route-heads": "attnopt.passes.route_heads:RouteHeads",
        "soft-pag": "attnopt.passes.soft_pag:SoftPAG",
        "head-patch": "attnopt.passes.head_patch:HeadPatch",
    },
    "attnopt.backends": {
        "reference": "attnopt.backends.reference:Reference",
        "sdpa": "attnopt.backends.sdpa:Sdpa",
        "blocked": "attnopt.backends.blocked:Blocked",
    },
}


@dataclass(frozen=True)
class Plugin:
    """A named pass or backend that may not be imported yet.  ``target`` is "module:attribute"."""

    name: str
    kind: str  # "pass" or "backend"
    target: str
    distribution: str
    rivals: tuple[str, ...] = ()  # other distributions that claim the name

    def load(self) -> Any:
        """The class; PluginError, naming the distribution, where it cannot be imported or its name is contested."""
        if self.rivals:
            claims = ", ".join((self.distribution, *self.rivals))
            raise PluginError(f"{self.kind} {self.name!r} is claimed by {claims}", hint="uninstall all but one of them")
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:  # a plugin may fail in any way while it is imported
            why = f"{type(error).__name__}: {error}"
            message = f"{self.kind} {self.name!r} of {self.distribution} ({self.target}) cannot be loaded: {why}"
            raise PluginError(message, hint=f"repair or uninstall {self.distribution}") from error


@dataclass(frozen=True)
class Description:
    """A row of a listing.

    ``options``: option names and defaults ("required" where there is none); ``exact``: None for a backend; ``error``:
    why it cannot be loaded, "" if it can.
    """

    kind: str
    name: str
    exact: bool | None
    options: dict[str, str]
    summary: str
    distribution: str
    error: str = ""


def passes() -> dict[str, Plugin]:
    """All known passes by name, none of them imported."""
    return _listed("attnopt.passes", "pass")


def backends() -> dict[str, Plugin]:
    """All known backends by name, none of them imported."""
    return _listed("attnopt.backends", "backend")


def load_pass(name: str) -> type[Pass]:
    """The pass class of this name.  Raises PolicyError for an unknown name, PluginError for a broken plugin."""
    loaded: type[Pass] = _of_kind(_find(name, passes(), "pass"), Pass)
    return loaded


def load_backend(name: str) -> type[Backend]:
    """The backend class of this name.  Raises PolicyError for an unknown name, PluginError for a broken plugin."""
    loaded: type[Backend] = _of_kind(_find(name, backends(), "backend"), Backend)
    return loaded


def describe() -> list[Description]:
    """Every pass, then every backend; a plugin that cannot be loaded is listed with its error."""
    loaders: tuple[tuple[dict[str, Plugin], Callable[[str], type[Any]]], ...] = (
        (passes(), load_pass),
        (backends(), load_backend),
    )
    return [_described(plugin, load) for listed, load in loaders for plugin in listed.values()]


def _listed(group: str, kind: str) -> dict[str, Plugin]:
    return dict(_offered(group, kind, tuple((str(place), _changed(place)) for place in sys.path)))


def _changed(place: str) -> int:
    """When something was last installed there."""
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


@lru_cache(8)  # reading what all distributions offer takes longer than all else about a rule of a policy
def _offered(group: str, kind: str, places: tuple[tuple[str, int], ...]) -> dict[str, Plugin]:
    claims: dict[str, dict[str, str]] = {name: {OURS: target} for name, target in _BUILT_IN[group].items()}
    for entry in entry_points(group=group):
        distribution = entry.dist.name if entry.dist else "an unknown distribution"
        claims.setdefault(entry.name, {}).setdefault(distribution, entry.value)
    listed: dict[str, Plugin] = {}
    for name, targets in claims.items():
        (distribution, target), *others = targets.items()
        listed[name] = Plugin(name, kind, target, distribution, tuple(rival for rival, _ in others))
    return listed


def _find(name: str, listed: dict[str, Plugin], kind: str) -> Plugin:
    if name in listed:
        return listed[name]
    near = difflib.get_close_matches(name, listed, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else None
    raise PolicyError(f"there is no {kind} {name!r}; there are {', '.join(listed)}", hint=hint)


def _of_kind(plugin: Plugin, base: type[Any]) -> Any:
    loaded = plugin.load()
    if isinstance(loaded, type) and issubclass(loaded, base):
        return loaded
    raise PluginError(f"{plugin.target} of {plugin.distribution} is not a subclass of attnopt's {base.__name__}")


def _described(plugin: Plugin, load: Callable[[str], type[Any]]) -> Description:
    try:
        loaded = load(plugin.name)
    except PluginError as error:
        return Description(plugin.kind, plugin.name, None, {}, "", plugin.distribution, error.message)
    summary = (inspect.getdoc(loaded) or "").partition("\n")[0]
    exact = getattr(loaded, "exact", None)
    return Description(plugin.kind, plugin.name, exact, _options(loaded), summary, plugin.distribution)


def _options(loaded: type[Any]) -> dict[str, str]:
    parameters = inspect.signature(loaded).parameters.values()
    return {p.name: "required" if p.default is p.empty else repr(p.default) for p in parameters}
