"""What a model is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class CallInputs(NamedTuple):
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: object, kwargs: Mapping[str, object] | None = None) -> CallInputs:
        """As users give them: a single argument needs no tuple."""
        return cls(args if isinstance(args, tuple) else (args,), dict(kwargs or {}))
