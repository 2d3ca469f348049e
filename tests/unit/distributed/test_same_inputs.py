"""What ranks pass to one call, without other ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.base.call_inputs import CallInputs
from attnopt.distributed.same_inputs import require_same_inputs, sampled
from attnopt.errors import DistributedError

IDS = torch.arange(26).view(2, 13)
X = torch.randn(2, 700, 3, generator=torch.Generator().manual_seed(0))
HIDDEN = X.masked_fill(X > 1, float("-inf"))


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (IDS, IDS.clone()),
        (X, X + 1e-7 * X.abs().max()),  # computed in another order
        (1e-3 * X, 1e-3 * X),
        (X.bfloat16(), X.bfloat16()),
        (X.to(torch.complex64), X.to(torch.complex64)),
        (HIDDEN, HIDDEN.clone()),
        (X.transpose(0, 1), X.transpose(0, 1).contiguous()),
        (X[:, :0], X[:, :0]),
        (torch.tensor(3), torch.tensor(3)),
        ([IDS, None, 2, "a"], [IDS, None, 2, "a"]),
    ],
)
def test_the_same_inputs(own: Any, other: Any) -> None:
    require_same_inputs([_told(own), _told(other), _told(own)])


@pytest.mark.parametrize(
    ("own", "other", "why"),
    [
        (IDS, IDS.flip(0), r"rank 2 passes other numbers than rank 0 as input 0, int64 \[2, 13\]"),
        (IDS, IDS[:, 1:], r"rank 2 passes int64 \[2, 12\] as input 0, and rank 0 int64 \[2, 13\]"),
        (IDS, IDS.int(), r"rank 2 passes int32 \[2, 13\] as input 0, and rank 0 int64 \[2, 13\]"),
        (1e-3 * X, 1e-3 * X.flip(0), r"other numbers than rank 0 as input 0, float32"),
        (X.bfloat16() / 64, X.flip(0).bfloat16() / 64, "other numbers"),
        (HIDDEN, X, "other numbers"),
        ([IDS, 2], [IDS, 3], "rank 2 passes 3 as input 1, and rank 0 2"),
        ([IDS, X], [IDS], "rank 2 passes 1 inputs, and rank 0 2"),
    ],
)
def test_other_inputs(own: Any, other: Any, why: str) -> None:
    with pytest.raises(DistributedError, match=why + r".*\n  hint: pass the same, whole inputs on every rank"):
        require_same_inputs([_told(own), _told(own), _told(other)])


def _told(given: Any) -> Any:
    return sampled(CallInputs(tuple(given) if isinstance(given, list) else (given,), {}))
