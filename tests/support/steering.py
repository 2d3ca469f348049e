"""Head outputs of the grammar's attentions shifted by hand, inside the user's own model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from models import Attention
from torch import Tensor


@contextmanager
def steered(
    model: Attention, by: Mapping[int, Tensor], tokens: Sequence[int] | None = None, time: int | None = None
) -> Iterator[None]:
    """Inside, [Dv] is added to these heads' outputs at some queries, in every call of ``model`` or in one (from 1 on)."""
    own, seen = model._attended, [0]

    def attended(*args: Any) -> tuple[Tensor, Tensor | None]:
        seen[0] += 1
        out, weights = own(*args)  # [B, L, H, Dv]
        if time in (None, seen[0]):
            out = out.clone()
            rows = sorted(
                {t % out.shape[1] for t in tokens if -out.shape[1] <= t < out.shape[1]}
                if tokens is not None
                else range(out.shape[1])
            )
            for h, delta in by.items():
                out[:, rows, h] += delta.to(out.dtype)
        return out, weights

    with mock.patch.object(model, "_attended", attended), torch.no_grad():
        yield
