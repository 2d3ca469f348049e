"""The switch under which faults of attnopt itself are raised, where a user gets a refusal with the reason."""

from __future__ import annotations

import os

VARIABLE = "ATTNOPT_DEBUG"


def debugging() -> bool:
    """Whether the environment says so; every test run does."""
    return os.environ.get(VARIABLE, "") not in ("", "0")
