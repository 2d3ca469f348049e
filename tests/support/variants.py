"""Variants of one test, of which `make test` runs some and `make test-slow` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(variants: Iterable[Any], *always: Any) -> list[Any]:
    """For ``pytest.mark.parametrize``: each variant, marked as slow unless it is among ``always``."""
    listed = list(variants)
    assert all(v in listed for v in always)
    return [v if v in always else pytest.param(v, marks=pytest.mark.slow) for v in listed]
