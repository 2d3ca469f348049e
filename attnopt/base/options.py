"""Checked option values: each function returns the normal form or raises a PolicyError that names the option."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping

from attnopt.errors import PolicyError

LARGEST = 2**31 - 1  # of any whole-number option; keeps position arithmetic inside int64
MOST = 1_000_000  # token positions in one option


def whole(owner: str, option: str, value: object, least: int = 0) -> int:
    """``value`` as an int of at least ``least``."""
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST:
        return value
    raise PolicyError(f"{owner}: invalid value {option}={value!r}: expected an integer from {least} to {LARGEST}")


def wholes(owner: str, option: str, values: object) -> tuple[int, ...]:
    """``values`` (one number or any iterable of numbers) as sorted distinct ints of at least 0."""
    many = _sequence(owner, option, [values] if isinstance(values, int) else values, "integers")
    return tuple(sorted({whole(owner, option, v) for v in many}))


def whole_tuple(owner: str, option: str, values: object, count: int | None, least: int = 0) -> tuple[int, ...]:
    """``values`` as ``count`` ints of at least ``least``: one for all or as many; ``count=None``: however many."""
    many = [values] * (count or 1) if isinstance(values, int) else _sequence(owner, option, values, "integers")
    if count is not None and len(many) != count:
        raise PolicyError(f"{owner}: invalid value {option}={values!r}: expected one integer or {count} of them")
    return tuple(whole(owner, option, v, least) for v in many)


def positions(owner: str, option: str, values: object) -> tuple[int, ...]:
    """``values`` (one position or any iterable of them) as sorted distinct ints; below 0 they count from the end."""
    if isinstance(values, range) and len(values) > MOST:
        raise PolicyError(f"{owner}: invalid value {option}={values!r}: expected at most {MOST} positions")
    many = _sequence(owner, option, [values] if isinstance(values, int) else values, "integers")
    return tuple(sorted({whole(owner, option, v, least=-LARGEST) for v in many}))


def switches(owner: str, option: str, values: object, count: int) -> tuple[bool, ...]:
    """``values`` as ``count`` bools: one for all or as many."""
    many = [values] * count if isinstance(values, bool) else values
    if isinstance(many, (list, tuple)) and len(many) == count and all(isinstance(v, bool) for v in many):
        return tuple(many)
    raise PolicyError(f"{owner}: invalid value {option}={values!r}: expected True or False, or {count} of them")


def switch(owner: str, option: str, value: object) -> bool:
    """``value``, which must be True or False."""
    if isinstance(value, bool):
        return value
    raise PolicyError(f"{owner}: invalid value {option}={value!r}: expected True or False")


def number(owner: str, option: str, value: object) -> float:
    """``value`` as a finite float."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise PolicyError(f"{owner}: invalid value {option}={value!r}: expected a finite number")


def numbers(owner: str, option: str, values: object) -> tuple[float, ...]:
    """``values`` (any iterable, also a 1-D tensor) as finite floats."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    return tuple(number(owner, option, v) for v in _sequence(owner, option, listed, "finite numbers"))


def choice(owner: str, option: str, value: object, allowed: tuple[str, ...]) -> str:
    """``value``, which must be one of ``allowed``."""
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, n=2) if isinstance(value, str) else []
    raise PolicyError(
        f"{owner}: invalid value {option}={value!r}: expected one of {', '.join(map(repr, allowed))}",
        hint=f"did you mean {' or '.join(map(repr, near))}?" if near else None,
    )


def _sequence(owner: str, option: str, values: object, what: str) -> list[object]:
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)):
        return list(values)
    raise PolicyError(f"{owner}: invalid value {option}={values!r}: expected a sequence of {what}")
