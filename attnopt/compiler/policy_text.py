"""Passes, and the alternatives among them, as Python values, texts and plain data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from attnopt.base.input import Input
from attnopt.base.notation import QUOTED, construct, evaluate, shortened
from attnopt.compiler import plugins
from attnopt.compiler.where import Where, where
from attnopt.errors import PolicyError
from attnopt.ir.alternatives import KINDS, Alternatives
from attnopt.ir.block_scores import BlockScores
from attnopt.ir.constant import Constant
from attnopt.ir.importance import Importance
from attnopt.ir.interfaces import Pass
from attnopt.ir.mixer import Mixer
from attnopt.ir.row_scores import RowScores
from attnopt.patterns import Pattern
from attnopt.patterns.registry import constructor

Step = Pass | Alternatives  # whose alternatives are tuples of steps
Steps = tuple[Step, ...]

_KEBAB = re.compile(rf"{QUOTED}|(?<![\w.])[A-Za-z_][\w.]*+(?:-\w++)+")  # the exponent of 1e-5 is not a name
_SLICE = re.compile(rf"{QUOTED}|(?<=layers=)-?\d*:-?\d*(?::-?\d*)?(?=\s*[,)])")
_LINK = re.compile(rf"{QUOTED}|(?<=\))\s*\.\s*(?=(?:heads|expect)\s*\()")
_NAMED = {kind.name: kind for kind in KINDS}


def read_steps(given: object) -> Steps:
    """From a pass, alternatives, text, a mapping with the options of a pass, or a sequence of these.  Raises PolicyError."""
    if isinstance(given, Pass):
        return (given,)
    if isinstance(given, Alternatives):
        return (_of_steps(given),)
    if isinstance(given, str):
        return _from_text(given)
    if isinstance(given, Mapping):
        return (_from_mapping(given),)
    if isinstance(given, Iterable):
        return tuple(step for item in given for step in read_steps(item))
    raise PolicyError(f"{given!r} is not a pass", hint=_remedy(given))


def _remedy(given: object) -> str:
    if isinstance(given, type) and issubclass(given, Pass):
        return f"call it with its options: {given.__name__}(...)"
    if isinstance(given, Pattern):
        return "a pattern goes into a pass: Sparse(pattern)"
    return "use a pass, a list of passes, or text such as 'local-window(left=8)'"


def passes_in(steps: Steps) -> Iterator[Pass]:
    """Every pass among them, of all alternatives."""
    for step in steps:
        if isinstance(step, Pass):
            yield step
        else:
            yield from (p for own in step.alternatives for p in passes_in(own))


def steps_to_json(steps: Steps) -> list[dict[str, Any]]:
    """Plain data, which ``read_steps`` reads back."""
    return [_step_to_json(step) for step in steps]


def read_where(text: str) -> Where:
    """A condition as it prints itself, such as ``where(causal=True, layers=2:-2).expect(12)``.  Raises PolicyError."""
    quoted = _outside(_SLICE, lambda found: repr(found), _outside(_KEBAB, _underscored, text))
    made, *links = evaluate(f"({_outside(_LINK, lambda _: ', ', quoted)},)", _condition, shown=text)
    if not isinstance(made, Where) or not all(map(callable, links)):
        raise PolicyError(
            f"{shortened(text)!r} is not a condition", hint='write it as in "where(causal=True, layers=2:-2)"'
        )
    read: Where = made
    for link in links:
        read = link(read)
    return read


# ---------------------------------------------------------------- texts
def _from_text(text: str) -> Steps:
    kebab_free = _outside(_KEBAB, _underscored, text)
    found = evaluate(f"({kebab_free},)" if text.strip() else "()", _lookup, shown=text)
    for value in found:
        if not isinstance(value, Step):
            raise PolicyError(f"{value!r} in {text!r} is not a pass", hint="a pattern goes into sparse(pattern=...)")
    return read_steps(found)


def _outside(pattern: re.Pattern[str], write: Callable[[str], str], text: str) -> str:
    """``text`` with what ``pattern`` finds outside of quotes written anew."""
    return pattern.sub(lambda m: m[0] if m[0][:1] in ("'", '"') else write(m[0]), text)


def _underscored(name: str) -> str:
    return name.replace("-", "_")


def _lookup(name: str) -> Callable[..., object]:
    known = next((n for n in plugins.passes() if n.replace("-", "_") == name), None)
    if known is None and (kind := _NAMED.get(name.replace("_", "-"))) is not None:
        return kind
    if known is None and name == "none":
        return lambda: None
    if known is None and name[:1].isupper():
        return constructor(name)
    return plugins.load_pass(known or name.replace("_", "-"))


def _condition(name: str) -> Callable[..., object]:
    if name == "where":
        return where
    if name in ("heads", "expect"):
        return lambda *args, **options: lambda made: construct(name, getattr(made, name), list(args), options)
    raise PolicyError(f"unknown name {name!r} in a condition", hint="write where(...), .heads(...) or .expect(...)")


# ---------------------------------------------------------------- plain data
def _from_mapping(given: Mapping[Any, object]) -> Step:
    options = dict(given)
    if len(options) == 1 and (kind := _NAMED.get(next(iter(options)))) is not None:
        return _of_steps(kind(*_listed(kind.name, options[kind.name])))
    name = options.pop("pass", None)
    if not isinstance(name, str):
        raise PolicyError(
            f"{dict(given)!r} does not name a pass", hint='write it as {"pass": "local-window", "left": 128}'
        )
    if not all(isinstance(option, str) for option in options):
        raise PolicyError(f"{name}: options must be names, not {[o for o in options if not isinstance(o, str)]}")
    read = {option: _option(value) for option, value in options.items()}
    made = construct(name, plugins.load_pass(name), [], read)
    assert isinstance(made, Step)
    return made if isinstance(made, Pass) else _of_steps(made)


def _option(value: object) -> object:
    """``{"choice": [64, 256]}`` is ``Choice(64, 256)``."""
    if isinstance(value, Mapping) and len(value) == 1 and (kind := _NAMED.get(next(iter(value)))) is not None:
        return kind(*map(_option, _listed(kind.name, value[kind.name])))
    return value


def _listed(name: str, given: object) -> Sequence[object]:
    if isinstance(given, (list, tuple)):
        return given
    raise PolicyError(f"{name}: invalid value {given!r}: expected a list of alternatives")


def _of_steps(given: Alternatives) -> Alternatives:
    """The same, each alternative as a tuple of steps."""
    read = [() if x is None else read_steps(x) for x in given.alternatives]
    return type(given)(*(x[0] if len(x) == 1 and type(x[0]) is type(given) else x for x in read))


def _step_to_json(step: Step) -> dict[str, Any]:
    if isinstance(step, Alternatives):
        return {step.name: [steps_to_json(own) for own in step.alternatives]}
    options: dict[str, object] = {f.name: getattr(step, f.name) for f in fields(step) if f.init}  # type: ignore[arg-type]
    return {"pass": step.name, **{option: _plain(value) for option, value in options.items()}}


def _plain(value: object) -> object:
    if isinstance(value, (Pattern, BlockScores, RowScores, Constant, Importance, Input, Mixer)):
        return value.to_json()
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
