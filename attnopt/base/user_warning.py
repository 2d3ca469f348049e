"""attnopt's warnings, attributed to the user's line: the innermost frame outside attnopt and torch."""

from __future__ import annotations

import sys
import warnings

from attnopt.errors import AttnoptWarning

_BETWEEN = ("attnopt", "torch", "contextlib", "functools")  # packages whose lines no user wrote


def warn(text: str) -> None:
    """An AttnoptWarning at the line of the user that led to it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_between(frame.f_globals.get("__name__")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, AttnoptWarning, stacklevel=level)


def _is_between(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _BETWEEN
