"""Classes by name: attnopt's own, those registered in this process, and those of installed distributions.

A third party writes ``[project.entry-points."attnopt.passes"]`` and ``"acme.last-k" = "acme:LastK"`` in its pyproject, or
decorates the class with ``@attnopt.register``.  Listing names imports nothing, and a file can only name listed classes.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points, packages_distributions
from typing import Any, Generic, TypeVar

from attnopt.base.options import choice
from attnopt.errors import PluginError, PolicyError

OURS = "attnopt"
HERE = "this process"  # instead of the distribution of a class that was registered by a call

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """A named class that may not be imported yet.  ``target`` is "module:attribute"."""

    name: str
    kind: str
    target: str
    distribution: str
    rivals: tuple[str, ...] = ()  # others with the same name
    ready: type | None = None  # the class, if it was registered by a call

    def load(self) -> object:
        """The class.  Raises PluginError that names the distribution if it cannot be imported or its name is ambiguous."""
        if self.rivals:
            claims = ", ".join((self.distribution, *self.rivals))
            raise PluginError(f"{self.kind} {self.name!r} is defined by {claims}", hint="uninstall all but one of them")
        if self.ready is not None:
            return self.ready
        module, _, attribute = self.target.partition(":")
        try:
            found: object = import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:  # a plugin may fail in any way while it is imported
            why = f"{type(error).__name__}: {error}"
            message = f"{self.kind} {self.name!r} of {self.distribution} ({self.target}) cannot be loaded: {why}"
            raise PluginError(message, hint=f"fix or uninstall {self.distribution}") from error
        return found


class Registry(Generic[T]):
    """The classes of one kind by name.  ``own``: attnopt's, as classes or as targets that are imported on demand.

    ``named`` returns the name of a class; it must match the name of its registration.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        base: type[T],
        own: Mapping[str, str | type[T]],
        named: Callable[[Any], object] = lambda cls: cls.__name__,
    ) -> None:
        self.group, self.kind, self.base, self._named = group, kind, base, named
        self._own = {n: _plugin(n, kind, OURS, target) for n, target in own.items()}
        self._registered: dict[str, Plugin] = {}
        self.changes = 0  # number of registrations: texts parsed before may parse differently now

    def name_of(self, cls: type[T]) -> str:
        """What the class calls itself."""
        return str(self._named(cls))

    def listed(self) -> dict[str, Plugin]:
        """All known entries, without importing them."""
        found = {name: [plugin] for name, plugin in self._own.items()}
        for name, target, distribution in _offered(self.group):
            plugin = _plugin(name, self.kind, distribution, target)
            claims = found.setdefault(plugin.name, [])
            if all(plugin.distribution != other.distribution for other in claims):
                claims.append(plugin)
        for plugin in self._registered.values():
            claims = found.setdefault(plugin.name, [])
            if not any(_is_same(plugin, other) for other in claims):
                claims.append(plugin)
        return {name: _contested(claims) for name, claims in found.items()}

    def load(self, name: str) -> type[T]:
        """The class of this name.  Raises PolicyError for an unknown name, PluginError for a broken plugin."""
        listed = self.listed()
        if name not in listed:
            near = difflib.get_close_matches(name, listed, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else None
            raise PolicyError(f"unknown {self.kind} {name!r}; available: {', '.join(listed)}", hint=hint)
        plugin = listed[name]
        loaded = plugin.load()
        whose = f"{plugin.target} of {plugin.distribution}"
        if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
            raise PluginError(f"{whose} is not a subclass of attnopt's {self.base.__name__}")
        if (own := self._named(loaded)) != name:
            raise PluginError(
                f"{whose} is installed as {name!r}, but its own name is {own!r}",
                hint="use the same name in both places",
            )
        return loaded

    def make(self, name: str, hint: str = "give every option a default") -> T:
        """An instance without options.  Raises like ``load``, or PluginError if there must be some."""
        cls = self.load(name)
        try:
            return cls()
        except Exception as e:  # a plugin may fail in any way
            whose = f"{self.kind} {name!r} of {self.listed()[name].distribution}"
            raise PluginError(
                f"{whose} cannot be constructed without arguments: {type(e).__name__}: {e}", hint=hint
            ) from e

    def choose(self, owner: str, option: str, name: object) -> T:
        """An instance for the value of an option.  Raises PolicyError that names the option, PluginError."""
        return self.make(choice(owner, option, name, tuple(self.listed())))

    def register(self, cls: type[T]) -> None:
        """Register a class under its name in this process.  Raises PluginError if the name is taken.

        The same class again, or a redefinition in the same module (a rerun notebook cell), is not a clash.
        """
        name = self._named(cls)
        if not isinstance(name, str) or not name:
            raise PluginError(f"{target_of(cls)} does not define a {self.kind} name")
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
            raise PluginError(f"{self.kind} {name!r} ({target_of(cls)}) does not define {missing}")
        holder = self.listed().get(name)
        made = Plugin(name, self.kind, target_of(cls), HERE, ready=cls)
        if holder is not None and not _is_same(holder, made):
            raise PluginError(
                f"{self.kind} {name!r} is already {holder.target} of {holder.distribution}",
                hint=f"rename {target_of(cls)}",
            )
        self._registered[name] = made
        self.changes += 1

    def knows(self, cls: type) -> bool:
        """Whether the name of this class resolves to it, so a file that contains the name can be read."""
        name = self._named(cls)
        if name not in self.listed():
            return False
        try:
            return self.load(name) is cls
        except PluginError:
            return False


def _is_same(a: Plugin, b: Plugin) -> bool:
    """One class: an entry point may name it by its package, and the class itself by the module that it is defined in."""
    if a.target == b.target:
        return True
    (package, _, name), (other_package, _, other_name) = a.target.partition(":"), b.target.partition(":")
    tops = package.partition(".")[0], other_package.partition(".")[0]
    return (a.distribution == HERE) != (b.distribution == HERE) and tops[0] == tops[1] and name == other_name


def target_of(cls: type) -> str:
    """Where a class is defined, as in an entry point."""
    return f"{cls.__module__}:{cls.__qualname__}"


def distribution_of(cls: type) -> str:
    """The installed distribution of a class; "" if there is none."""
    return _distribution_of(cls.__module__.partition(".")[0])


@lru_cache(256)
def _distribution_of(package: str) -> str:
    return OURS if package == OURS else next(iter(packages_distributions().get(package, ())), "")


def _plugin(name: str, kind: str, distribution: str, target: str | type) -> Plugin:
    if isinstance(target, str):
        return Plugin(name, kind, target, distribution)
    return Plugin(name, kind, target_of(target), distribution, ready=target)


def _contested(claims: list[Plugin]) -> Plugin:
    first, *others = claims
    if not others:
        return first
    return Plugin(first.name, first.kind, first.target, first.distribution, tuple(p.distribution for p in others))


Offer = tuple[str, str, str]  # the name, the target and the distribution of an entry point


def _offered(group: str) -> tuple[Offer, ...]:
    return _installed(group, tuple((str(place), _changed(place)) for place in sys.path))


def _changed(place: str) -> int:
    """When something was last installed there."""
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


@lru_cache(32)  # reading the metadata of every distribution takes longer than all else about a rule of a policy
def _installed(group: str, places: tuple[tuple[str, int], ...]) -> tuple[Offer, ...]:
    return tuple(
        (e.name, e.value, e.dist.name if e.dist else "an unknown distribution") for e in entry_points(group=group)
    )
