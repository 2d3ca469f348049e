"""Calls written as text, such as ``Causal() & Window(3, 0)``, read through ``ast``: only known names are called."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeVar

from attnopt.errors import PolicyError

LONGEST = 1 << 20  # characters per text
LARGEST_NUMBER = 64  # bits of an integer
QUOTED = r"'(?:\\[\s\S]|[^'\\])*+'?|\"(?:\\[\s\S]|[^\"\\])*+\"?"  # a string in a text

_JOINS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_PLAIN = (int, float, complex, str, bytes, tuple, list, dict, type(None), type(...))

K = TypeVar("K")
V = TypeVar("V")
Lookup = Callable[[str], Callable[..., object]]  # name -> constructor; raises PolicyError for an unknown name


def evaluate(text: str, lookup: Lookup, *, shown: str | None = None) -> Any:
    """The value of ``text``: literals, calls of the names that ``lookup`` knows, and ``&``, ``|``, ``~`` between calls.

    A name without parentheses is a call without arguments.  Raises PolicyError for anything else,
    which quotes ``shown`` instead of ``text`` if given.
    """
    if len(text) > LONGEST:
        raise PolicyError(f"text too long: {len(text)} characters, at most {LONGEST} are read")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, lookup)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error) or "nested too deeply"
        raise PolicyError(f"cannot read {shortened(shown or text)!r}: {why}") from error


def construct(name: str, make: Callable[..., object], args: list[object], options: dict[str, object]) -> object:
    """``make(*args, **options)``; unknown arguments raise a PolicyError that lists the known ones."""
    own = getattr(make, "name", None)
    name = own if isinstance(own, str) else name  # "local-window", which the text had to write as local_window
    signature = inspect.signature(make)
    hint = f"{name} takes {', '.join(signature.parameters) or 'no arguments'}"
    try:
        signature.bind_partial(**options)  # first, so a misspelt option is not reported as a missing one
        signature.bind(*args, **options)
    except TypeError as error:
        raise PolicyError(f"{name}: {error}", hint=hint) from error
    return make(*args, **options)


def _value(node: ast.expr, lookup: Lookup) -> Any:
    match node:
        case ast.Constant(int(value)) if value.bit_length() > LARGEST_NUMBER:
            raise PolicyError(f"number too large ({value.bit_length()} bits)")
        case ast.Constant(value):
            return value
        case ast.List(elements) | ast.Tuple(elements):
            return tuple(_value(e, lookup) for e in elements)
        case ast.Dict(keys, values):
            return distinct([(_key(k, lookup), _value(v, lookup)) for k, v in zip(keys, values, strict=True)])
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float()) as amount):
            return -_value(amount, lookup)
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_joinable(operand, lookup)
        case ast.BinOp(left, op, right) if type(op) in _JOINS:
            return _JOINS[type(op)](_joinable(left, lookup), _joinable(right, lookup))
        case ast.Name() | ast.Attribute():
            return construct(_dotted(node), lookup(_dotted(node)), [], {})
        case ast.Call(func, args, keywords):
            name = _dotted(func)
            options = distinct([(_keyword(k), _value(k.value, lookup)) for k in keywords])
            return construct(name, lookup(name), [_value(a, lookup) for a in args], options)
    raise PolicyError(f"{_source(node)} cannot be read", hint="use only names with arguments, literals, and &, |, ~")


def _joinable(node: ast.expr, lookup: Lookup) -> Any:
    value = _value(node, lookup)
    if isinstance(value, _PLAIN) or not hasattr(value, "__and__"):
        raise PolicyError(f"{_source(node)} cannot be combined with &, | or ~", hint="only patterns can")
    return value


def _key(node: ast.expr | None, lookup: Lookup) -> object:
    key = None if node is None else _value(node, lookup)
    try:
        hash(key)
    except TypeError:
        key = None
    if key is None:
        raise PolicyError("a mapping key must be a number, a string or a tuple")
    return key


def distinct(pairs: list[tuple[K, V]]) -> dict[K, V]:
    """The pairs as a mapping; a duplicate key would silently lose its first value."""
    found: dict[K, V] = {}
    for key, value in pairs:
        if key in found:
            raise PolicyError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise PolicyError("** is not supported", hint="write every option as name=value")
    return keyword.arg


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(base, name):
            return f"{_dotted(base)}.{name}"
    raise PolicyError(f"{_source(node)} is not a name")


def _source(node: ast.expr) -> str:
    return repr(shortened(ast.unparse(node)))


def shortened(text: str, length: int = 80) -> str:
    """Truncated to this many characters."""
    return text if len(text) <= length else text[: length - 3] + "..."
