from __future__ import annotations

import pytest
import torch
from ranks import on_ranks

pytestmark = pytest.mark.subprocess


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_ranks_on(device: str) -> None:
    """One rank on each GPU, at most two."""
    ranks = min(2, torch.cuda.device_count()) if device == "cuda" else 2
    failed = on_ranks(ranks, checks="device_checks", device=device)
    assert not failed, failed
