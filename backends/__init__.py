"""The built-in ways to compute an attention, one file each."""

from __future__ import annotations

if __name__ != "attnopt.backends":
    raise ImportError(f"{__name__} would be a second copy of attnopt.backends; import attnopt.backends instead")

from attnopt.backends.blocked import Blocked
from attnopt.backends.reference import Reference
from attnopt.backends.sdpa import Sdpa

__all__ = ["Blocked", "Reference", "Sdpa"]
