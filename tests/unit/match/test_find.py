from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.errors import PeerError
from attnopt.match import find as finding


def test_a_failure_of_another_process_is_no_near_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> float:
        raise PeerError("rank 1 failed")

    monkeypatch.setattr(finding, "site_error", fails)
    monkeypatch.delenv("ATTNOPT_DEBUG")
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    program = capture(model, CallInputs((torch.randn(2, 5, 8),), {}))
    with pytest.raises(PeerError, match="rank 1 failed"):
        finding.find(program)
