"""What a model is called with."""

from __future__ import annotations

from typing import Any, NamedTuple


class CallInputs(NamedTuple):
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
