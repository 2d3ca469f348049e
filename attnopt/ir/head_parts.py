"""An attention computed in parts, each some of its heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from attnopt.base.bit_table import indices


def of_heads(x: Tensor | None, places: Sequence[int]) -> Tensor | None:
    """The part of an operand that broadcasts to [B, H, L, ...]."""
    return x if x is None or x.dim() < 4 or x.shape[1] == 1 else taken(x, places)


def taken(x: Tensor, places: Sequence[int]) -> Tensor:
    """Some heads of [B, H, ...]."""
    first, last = places[0], places[-1]
    if tuple(places) != tuple(range(first, last + 1)):
        return x.index_select(1, indices(places, x.device))
    return x if len(places) == x.shape[1] else x[:, first : last + 1]


def in_order(made: Sequence[Tensor], of_parts: Sequence[Sequence[int]]) -> Tensor:
    """The heads of all outputs, each at its place."""
    if len(made) == 1:
        return made[0]
    home = {place: (part, i) for part, places in enumerate(of_parts) for i, place in enumerate(places)}
    runs = groupby((home[place] for place in sorted(home)), key=lambda at: at[0])
    return torch.cat([taken(made[part], [i for _, i in run]) for part, run in runs], 1)
