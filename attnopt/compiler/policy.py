"""Which passes each attention gets: rules from site names to passes, in Python, text, YAML or JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attnopt.base.input import Input
from attnopt.base.notation import construct, evaluate, shortened
from attnopt.compiler import plugins
from attnopt.compiler.policy_file import SUFFIXES, read_file
from attnopt.errors import PolicyError
from attnopt.ir.block_scores import BlockScores
from attnopt.ir.constant import Constant
from attnopt.ir.importance import Importance
from attnopt.ir.interfaces import Pass
from attnopt.ir.row_scores import RowScores
from attnopt.patterns import Pattern
from attnopt.patterns.registry import constructor

_QUOTED = r"'(?:\\[\s\S]|[^'\\])*+'?|\"(?:\\[\s\S]|[^\"\\])*+\"?"
_KEBAB = re.compile(rf"{_QUOTED}|(?<![\w.])[A-Za-z_][\w.]*+(?:-\w++)+")  # the exponent of 1e-5 is not a name

Rule = tuple[str, tuple[Pass, ...]]


@dataclass(frozen=True)
class Policy:
    """Ordered rules, each a glob over site names with the passes for the sites that it matches.

    A rule whose glob is exactly the name of the site takes precedence; otherwise the LAST matching rule applies;
    without a match, the site gets no passes.  A site in the root module has the name "" and is matched by "" and "*".
    Raises PolicyError for a duplicate glob.
    """

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        twice = next((glob for glob, n in Counter(glob for glob, _ in self.rules).items() if n > 1), None)
        if twice is not None:
            raise PolicyError(f"duplicate rule {twice!r}", hint="merge them into one rule with the passes of both")

    @classmethod
    def of(cls, given: object) -> Policy:
        """A policy from a pass, a sequence of passes, a mapping from globs to passes, a YAML or JSON file, or text.

        Text is a comma-separated list of calls, such as ``"prune-heads(heads=[0, 1]), local-window(left=128)"``.  It
        may replace a pass anywhere, and so may a mapping such as ``{"pass": "local-window", "left": 128}``.  Passes
        without a site name apply to all sites.  Raises PolicyError that names the file, rule or option.
        """
        if isinstance(given, Policy):
            return given
        if isinstance(given, Path) or (isinstance(given, str) and given.endswith(SUFFIXES)):
            return _from_file(Path(given))
        return _from_data(given)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What each call of the rewritten model has to bring for its passes."""
        return tuple(dict.fromkeys(i for _, passes in self.rules for p in passes for i in p.inputs))

    def passes_for(self, site_name: str) -> tuple[Pass, ...]:
        """The passes for the site of this name, in order of application."""
        glob = self._deciding(site_name)
        return () if glob is None else dict(self.rules)[glob]

    def unmatched(self, site_names: Iterable[str]) -> list[str]:
        """The globs that match none of these sites."""
        names = list(site_names)
        return [glob for glob, _ in self.rules if not any(glob == n or fnmatchcase(n, glob) for n in names)]

    def overruled(self, site_names: Iterable[str]) -> list[str]:
        """The globs that match some of these sites but are overridden by other rules at all of them."""
        names = list(site_names)
        deciding = {self._deciding(n) for n in names}
        return [glob for glob, _ in self.rules if glob not in {*deciding, *self.unmatched(names)}]

    def _deciding(self, site_name: str) -> str | None:
        globs = [glob for glob, _ in self.rules]
        if site_name in globs:
            return site_name
        return next((glob for glob in reversed(globs) if fnmatchcase(site_name, glob)), None)

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """The policy as plain data, which is also what a policy file may hold; ``from_json`` reads it back."""
        return {glob: [_pass_to_json(p) for p in passes] for glob, passes in self.rules}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Policy:
        """The inverse of ``to_json``; raises PolicyError."""
        return _from_data(data)


def _from_data(data: object) -> Policy:
    if isinstance(data, Mapping) and "pass" not in data:
        return Policy(tuple(_rule(glob, passes) for glob, passes in data.items()))
    return Policy((("*", _passes(data)),))


def _from_file(path: Path) -> Policy:
    data = read_file(path)
    try:
        return _from_data(data)
    except PolicyError as error:
        raise PolicyError(f"{path}: {shortened(error.message, 1000)}", hint=error.hint) from error


def _rule(glob: object, passes: object) -> Rule:
    if not isinstance(glob, str):
        raise PolicyError(f"rule {glob!r}: a site name must be a string", hint='put it in quotes, as in "encoder.*"')
    try:
        return glob, _passes(passes)
    except PolicyError as error:
        raise PolicyError(f"rule {glob!r}: {error.message}", hint=error.hint) from error


def _passes(given: object) -> tuple[Pass, ...]:
    if isinstance(given, Pass):
        return (given,)
    if isinstance(given, str):
        return _from_text(given)
    if isinstance(given, Mapping):
        return (_from_mapping(given),)
    if isinstance(given, Iterable):
        return tuple(p for item in given for p in _passes(item))
    raise PolicyError(
        f"{given!r} is not a pass", hint="use a pass, a list of passes, or text such as 'local-window(left=8)'"
    )


def _from_text(text: str) -> tuple[Pass, ...]:
    kebab_free = _KEBAB.sub(lambda m: m[0] if m[0][0] in "'\"" else m[0].replace("-", "_"), text)
    found = evaluate(f"({kebab_free},)" if text.strip() else "()", _lookup, shown=text)
    for value in found:
        if not isinstance(value, Pass):
            raise PolicyError(f"{value!r} in {text!r} is not a pass", hint="a pattern goes into sparse(pattern=...)")
    return tuple(found)


def _lookup(name: str) -> Callable[..., object]:
    known = next((n for n in plugins.passes() if n.replace("-", "_") == name), None)
    if known is None and name[:1].isupper():
        return constructor(name)
    return plugins.load_pass(known or name.replace("_", "-"))


def _from_mapping(given: Mapping[Any, object]) -> Pass:
    options = dict(given)
    name = options.pop("pass", None)
    if not isinstance(name, str):
        raise PolicyError(
            f"{dict(given)!r} does not name a pass", hint='write it as {"pass": "local-window", "left": 128}'
        )
    if not all(isinstance(option, str) for option in options):
        raise PolicyError(f"{name}: options must be names, not {[o for o in options if not isinstance(o, str)]}")
    made = construct(name, plugins.load_pass(name), [], options)
    assert isinstance(made, Pass)
    return made


def _pass_to_json(p: Pass) -> dict[str, object]:
    options: dict[str, object] = {f.name: getattr(p, f.name) for f in fields(p) if f.init}  # type: ignore[arg-type]
    return {"pass": p.name, **{option: _plain(value) for option, value in options.items()}}


def _plain(value: object) -> object:
    if isinstance(value, (Pattern, BlockScores, RowScores, Constant, Importance, Input)):
        return value.to_json()
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
