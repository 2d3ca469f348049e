"""Nearly every test of this folder exports."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_torchlib(one_torchlib: None) -> None:
    """For all of them."""
