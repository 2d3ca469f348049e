"""Objects of registered classes as texts: a name with or without options, such as ``"distance(prefix=1)"``."""

from __future__ import annotations

import re
from functools import partial
from typing import TypeVar

from attnopt.base.notation import evaluate
from attnopt.base.options import choice
from attnopt.base.registry import OURS, Registry, distribution_of
from attnopt.errors import PolicyError

_CALL = re.compile(r"\s*([A-Za-z][\w.-]*)\s*(\(.*\)|)\s*", re.DOTALL)
_SELF = "made"  # in the place of a name with hyphens

T = TypeVar("T")


def named_object(kinds: Registry[T], owner: str, option: str, given: object, hint: str) -> T:
    """What the text ``given`` constructs.  ``hint``: the remedy for options that cannot be read.  Raises PolicyError that names
    the option, PluginError."""
    called = _CALL.fullmatch(given) if isinstance(given, str) and given not in kinds.listed() else None
    name, options = (given, "") if called is None else (called[1], called[2])
    cls = kinds.load(choice(owner, option, name, tuple(kinds.listed())))
    if not options and distribution_of(cls) != OURS:
        return kinds.make(kinds.name_of(cls))
    try:
        made = evaluate(f"{_SELF}{options}", partial(_itself, cls), shown=str(given))
    except PolicyError as e:
        raise PolicyError(f"{owner}: {option}={given!r}: {e.message}", hint=e.hint or hint) from e
    assert isinstance(made, kinds.base)
    return made


def _itself(cls: type[T], name: str) -> type[T]:
    if name != _SELF:
        raise PolicyError(f"unknown name {name!r}")
    return cls
