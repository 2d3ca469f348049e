"""The built-in backends, one file each."""

from __future__ import annotations

if __name__ != "attnopt.backends":
    raise ImportError(f"{__name__} would be a second copy of attnopt.backends; import attnopt.backends instead")

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnopt.backends.blocked import Blocked
    from attnopt.backends.chunked import Chunked
    from attnopt.backends.reference import Reference
    from attnopt.backends.sdpa import Sdpa

__all__ = ["Blocked", "Chunked", "Reference", "Sdpa"]


def __getattr__(name: str) -> object:
    """Imported on first use: ``import attnopt`` only needs the operator."""
    if name not in __all__:
        raise AttributeError(f"module 'attnopt.backends' has no attribute {name!r}")
    return getattr(import_module(f"attnopt.backends.{name.lower()}"), name)
