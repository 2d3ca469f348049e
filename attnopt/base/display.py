"""How results show themselves: for a class and a form ("text", "html", "page") the function that renders it, by its name."""

from __future__ import annotations

from importlib import import_module
from typing import Literal

Form = Literal["text", "html", "page"]

_FUNCTIONS: dict[tuple[str, Form], str] = {}  # ("module:class", form) -> "module:function"


def shown_by(cls: str, form: Form, function: str) -> None:
    """Objects of ``cls``, "module:name", are rendered by ``function``, "module:name"; without importing either."""
    _FUNCTIONS[cls, form] = function


def shown(x: object, form: Form) -> str:
    """``x`` as the renderer of its class, or of the nearest class above it, shows it."""
    names = (f"{cls.__module__}:{cls.__qualname__}" for cls in type(x).__mro__)
    module, _, function = next(f for name in names if (f := _FUNCTIONS.get((name, form)))).partition(":")
    text: str = getattr(import_module(module), function)(x)
    return text
