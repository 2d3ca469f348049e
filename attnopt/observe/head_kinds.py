"""Kinds of heads: those whose maps and whose reach are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.base.cells import regridded
from attnopt.ir.curves import Curves
from attnopt.statistics.k_means import clustered

CELLS = 16  # of a side of the maps that are compared
COMPONENTS = 10


@dataclass(frozen=True)
class Kinds:
    """Of each head its cluster, and its place on the first two principal components."""

    clusters: tuple[int, ...]
    places: tuple[tuple[float, float], ...]


def kinds_of(maps: Sequence[Tensor], profiles: Sequence[Curves | None], count: int, seed: int) -> Kinds:
    """Of all heads of ``maps``, [H, R, C] for each attention: k-means on the principal components of square roots of the maps and
    of the profiles, whose distances are those of Hellinger between attentions."""
    longest = max((len(p.at) for p in profiles if p is not None), default=0)
    x = torch.cat([_features(m, p, longest) for m, p in zip(maps, profiles, strict=True)])
    x = x - x.mean(0)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()  # those of singular vectors are anybody's choice
    on_axes = (u * s * signs.T)[:, :COMPONENTS]
    plane = F.pad(on_axes[:, :2], (0, max(0, 2 - on_axes.shape[1])))
    members = clustered(on_axes, count, seed).tolist()
    return Kinds(tuple(members), tuple((a, b) for a, b in plane.tolist()))


def _features(maps_HRC: Tensor, profile: Curves | None, longest: int) -> Tensor:
    """[H, CELLS * CELLS + longest]: the map and the profile, each of length 1 if all attention is in it."""
    flat = regridded(maps_HRC.double(), CELLS, CELLS).clamp(min=0).flatten(1) / CELLS
    reach = torch.zeros(len(flat), longest, dtype=torch.float64)
    if profile is not None:
        values = torch.tensor(profile.values, dtype=torch.float64)
        reach[:, : values.shape[1]] = values
    return torch.cat([flat, reach], 1).sqrt()
