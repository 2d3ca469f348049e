"""Which passes each attention gets: rules from names and conditions to passes, in Python, text, YAML or JSON."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from attnopt.base.input import Input
from attnopt.base.notation import shortened
from attnopt.compiler.chosen_sites import matches
from attnopt.compiler.policy_file import SUFFIXES, read_file, write_file
from attnopt.compiler.policy_text import Step, Steps, passes_in, read_steps, read_where, steps_to_json
from attnopt.compiler.where import Heads, Where
from attnopt.errors import PolicyError
from attnopt.ir.alternatives import Alternatives, Choice
from attnopt.ir.interfaces import Pass

Key = str | Where
Rule = tuple[Key, Steps]
Chosen = Mapping[Where, Mapping[str, Heads]]  # by condition the sites that meet it, with their heads
_NONE: Chosen = {}


@dataclass(frozen=True, init=False)
class Policy:
    """Ordered rules, each a glob over site names, or ``attnopt.where(...)``, with the passes for the sites that it matches.

    A rule whose glob is exactly the name of the site takes precedence; otherwise the LAST matching rule applies;
    without a match, the site gets no passes.  A site in the root module has the name "" and is matched by "" and "*".
    ``rules``: pairs or a mapping.  Passes may be written as for ``of``.  Raises PolicyError, also for a duplicate rule.
    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = ()) -> None:
        pairs = rules.items() if isinstance(rules, Mapping) else rules
        read = tuple(_rule(key, passes) for key, passes in pairs)
        twice = next((key for key, n in Counter(key for key, _ in read).items() if n > 1), None)
        if twice is not None:
            raise PolicyError(f"duplicate rule {twice!r}", hint="merge them into one rule with the passes of both")
        object.__setattr__(self, "rules", read)

    @classmethod
    def of(cls, given: object) -> Policy:
        """A policy from a pass, a sequence of passes, a mapping from keys to passes, a YAML or JSON file, or text.

        Text is a comma-separated list of calls, such as ``"prune-heads(heads=[0, 1]), local-window(left=128)"``.  It
        may replace a pass anywhere, and so may a mapping such as ``{"pass": "local-window", "left": 128}``.  Passes
        without a key apply to all sites.  Raises PolicyError that names the file, rule or option.
        """
        if isinstance(given, Policy):
            return given
        if isinstance(given, Path) or (isinstance(given, str) and given.endswith(SUFFIXES)):
            return _from_file(Path(given))
        return _from_data(given)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What each call of the rewritten model has to bring for its passes."""
        return tuple(dict.fromkeys(i for p in self.passes for i in p.inputs))

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Every pass of every rule, those of all alternatives included."""
        return tuple(p for _, steps in self.rules for p in passes_in(steps))

    @property
    def conditions(self) -> tuple[Where, ...]:
        """The keys that are conditions."""
        return tuple(key for key, _ in self.rules if isinstance(key, Where))

    def without_choices(self) -> Policy:
        """Itself.  Raises PolicyError if it leaves a choice open."""
        if any(_has_choice(steps) for _, steps in self.rules):
            raise PolicyError(
                "the policy leaves a choice open, so it describes several models",
                hint="attnopt.search finds the best of them; FirstOf takes the first that an attention accepts",
            )
        return self

    def passes_for(self, site_name: str, chosen: Chosen = _NONE) -> Steps:
        """The passes for the site of this name, in order of application.  ``chosen``: for every condition."""
        key = self._deciding(site_name, chosen)
        if key is None:
            return ()
        steps, heads = dict(self.rules)[key], chosen[key][site_name] if isinstance(key, Where) else None
        return steps if heads is None else _on_heads(steps, heads)

    def unmatched(self, site_names: Iterable[str]) -> list[str]:
        """The globs that match none of these sites."""
        names = list(site_names)
        globs = [key for key, _ in self.rules if isinstance(key, str)]
        return [glob for glob in globs if not any(matches(glob, n) for n in names)]

    def overruled(self, site_names: Iterable[str], chosen: Chosen = _NONE) -> list[Key]:
        """The rules that match some of these sites but are overridden by others at all of them."""
        names = list(site_names)
        deciding = {self._deciding(n, chosen) for n in names}
        others = [key for key, _ in self.rules if key not in deciding]
        return [key for key in others if any(_matches(key, n, chosen) for n in names)]

    def _deciding(self, site_name: str, chosen: Chosen) -> Key | None:
        keys = [key for key, _ in self.rules]
        if site_name in keys:
            return site_name
        return next((key for key in reversed(keys) if _matches(key, site_name, chosen)), None)

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """The policy as plain data, which is also what a policy file may hold; ``from_json`` reads it back."""
        return {str(key): steps_to_json(steps) for key, steps in self.rules}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Policy:
        """The inverse of ``to_json``; raises PolicyError."""
        return _from_data(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a YAML or JSON file, which ``optimize`` reads.  Raises PolicyError if it would not read back."""
        data = self.to_json()
        try:
            again, why = _from_data(data), "it would not read back the same"
        except PolicyError as error:
            again, why = None, error.message
        if again != self:
            raise PolicyError(f"the policy cannot be saved: {why}", hint="register its parts, and name them by text")
        write_file(Path(path), data)


def _matches(key: Key, site_name: str, chosen: Chosen) -> bool:
    if isinstance(key, str):
        return matches(key, site_name)
    if key not in chosen:
        raise PolicyError(f"{key} chooses among all attentions of a model, so their names alone do not say which")
    return site_name in chosen[key]


def _has_choice(steps: Steps) -> bool:
    return any(
        isinstance(step, Choice) or (isinstance(step, Alternatives) and any(map(_has_choice, step.alternatives)))
        for step in steps
    )


# ---------------------------------------------------------------- reading
def _from_data(data: object) -> Policy:
    if isinstance(data, Mapping) and "pass" not in data:
        return Policy(data)
    return Policy((("*", read_steps(data)),))


def _from_file(path: Path) -> Policy:
    data = read_file(path)
    try:
        return _from_data(data)
    except PolicyError as error:
        raise PolicyError(f"{path}: {shortened(error.message, 1000)}", hint=error.hint) from error


def _rule(key: object, passes: object) -> Rule:
    if not isinstance(key, Key):
        raise PolicyError(
            f"rule {key!r}: a site name must be a string, or attnopt.where(...)",
            hint='put it in quotes, as in "encoder.*"',
        )
    try:
        read = read_where(key) if isinstance(key, str) and key.startswith("where(") else key
        steps = read_steps(passes)
        if isinstance(read, Where) and read.of_heads:
            _check_heads(steps)
    except PolicyError as error:
        raise PolicyError(f"rule {key!r}: {error.message}", hint=error.hint) from error
    return read, steps


# ---------------------------------------------------------------- heads inside of a site
def _check_heads(steps: Steps) -> None:
    """Every pass takes a list of heads.  Raises PolicyError."""
    for p in passes_in(steps):
        taken = {f.name for f in fields(p) if f.init}  # type: ignore[arg-type]
        if "heads" not in taken or not isinstance(_own_heads(p), Iterable | None):
            raise PolicyError(
                f"{p.name} has no option heads, and where(...).heads(...) chooses heads",
                hint="choose whole attentions for it, with where(...) alone",
            )


def _own_heads(p: Pass) -> Any:
    return getattr(p, "heads", None)


def _on_heads(steps: Steps, heads: tuple[int, ...]) -> Steps:
    """The passes on these heads alone, without those that have none left."""
    made: list[Step] = []
    for step in steps:
        if isinstance(step, Alternatives):
            made.append(type(step)(*(_on_heads(own, heads) for own in step.alternatives)))
            continue
        own = _own_heads(step)
        left = heads if own is None else tuple(h for h in own if h in heads)
        if left:
            made.append(replace(step, heads=left))  # type: ignore[type-var]
    return tuple(made)
